//! A digest that is read prints as it was written, and follows the grammar of the specification.

#![no_main]

use imagemirror::oci::Digest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let hex = text.strip_prefix("sha256:").filter(|hex| hex.len() == 64);
    let hex = hex.or_else(|| text.strip_prefix("sha512:").filter(|hex| hex.len() == 128));
    let is_digest = hex.is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    match text.parse::<Digest>() {
        Ok(digest) => assert!(is_digest && digest.to_string() == text),
        Err(_) => assert!(!is_digest, "{text} was refused"),
    }
});
