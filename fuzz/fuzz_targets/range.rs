//! A number that is read of a range stands in it, or one less does.

#![no_main]

use http::{
    HeaderMap, HeaderValue,
    header::{CONTENT_RANGE, RANGE},
};
use imagemirror::registry::header::{content_range, stored_bytes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|value: &[u8]| {
    let Ok(header) = HeaderValue::from_bytes(value) else { return };
    let headers = HeaderMap::from_iter([(RANGE, header.clone()), (CONTENT_RANGE, header)]);
    let numbers: Vec<u64> = value
        .split(|byte| !byte.is_ascii_digit())
        .filter_map(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
        .collect();
    if let Some(stored) = stored_bytes(&headers) {
        assert!(stored > 1 && numbers == [0, stored - 1], "{stored} of {numbers:?}");
    }
    if let Some((start, total)) = content_range(&headers) {
        assert!(start < total && numbers == [start, total - 1, total], "{start} of {total} of {numbers:?}");
    }
});
