//! The next page of a list is where the list is, whatever `Link` says, and no login is in its address.

#![no_main]

use http::{HeaderMap, HeaderValue, header::LINK};
use imagemirror::registry::header::next_page;
use libfuzzer_sys::fuzz_target;
use url::Url;

fuzz_target!(|value: &[u8]| {
    let Ok(value) = HeaderValue::from_bytes(value) else { return };
    let Ok(page) = Url::parse("https://r.example:8443/v2/a/tags/list?n=2") else { return };
    if let Ok(Some(next)) = next_page(&HeaderMap::from_iter([(LINK, value)]), &page) {
        assert_eq!((next.scheme(), next.host_str(), next.port()), ("https", Some("r.example"), Some(8443)), "{next}");
        assert_eq!((next.username(), next.password()), ("", None), "{next}");
    }
});
