//! `Retry-After` is digits, or a date that is not further away than dates go.

#![no_main]

use std::time::Duration;

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};
use imagemirror::registry::header::retry_after;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|value: &[u8]| {
    let Ok(header) = HeaderValue::from_bytes(value) else { return };
    let now = jiff::Timestamp::UNIX_EPOCH;
    let Some(pause) = retry_after(&HeaderMap::from_iter([(RETRY_AFTER, header)]), now) else { return };
    let text = value.trim_ascii();
    if text.iter().all(u8::is_ascii_digit) {
        let seconds = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        assert_eq!(seconds.map(Duration::from_secs), Some(pause));
    } else {
        let longest = jiff::Timestamp::MAX.duration_since(now).unsigned_abs();
        assert!(text.contains(&b':') && pause <= longest, "{pause:?}");
    }
});
