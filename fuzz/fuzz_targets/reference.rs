//! A reference that is read prints as one that is read to the same.

#![no_main]

use imagemirror::oci::Reference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(reference) = text.parse::<Reference>() else { return };
    let printed = reference.to_string();
    assert_eq!(printed.parse().as_ref(), Ok(&reference), "{text:?} is printed as {printed:?}");
});
