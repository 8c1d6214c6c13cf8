//! What holds of headers and error bodies whatever a registry sends, found with texts that nobody wrote by hand.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use jiff::{SignedDuration, Timestamp};
use proptest::{collection::vec, prelude::*};
use url::Url;

use super::{envelope, header as read};

const PAGE: &str = "https://r.example:8443/v2/a/tags/list?n=2";

fn headers(name: HeaderName, value: impl AsRef<[u8]>) -> HeaderMap {
    HeaderMap::from_iter([(name, HeaderValue::from_bytes(value.as_ref()).unwrap())])
}

/// The value of a header, whatever bytes may be in one.
fn any_value() -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![Just(b'\t'), 0x20..=0x7e_u8, 0x80..=0xff_u8], 0..60)
}

/// Where a hostile registry might send us.
fn any_target() -> impl Strategy<Value = String> {
    let origin = prop::sample::select(vec![
        "",
        "/",
        "//",
        "\\\\",
        "https:",
        "https://r.example:8443/",
        "https://r.example/",
        "http://r.example:8443/",
        "https://r.example:8443@evil.example/",
        "https://u:p@r.example:8443/",
        "https://evil.example/",
        "file:///",
        "data:",
        "blob:https://r.example:8443/",
        "//evil.example/",
        "HTTPS://R.EXAMPLE:8443/",
        "?",
        "#",
        "..//",
    ]);
    (origin, r"[a-z0-9/\\@:?#.%]{0,12}").prop_map(|(origin, rest)| format!("{origin}{rest}"))
}

/// A parameter of a link that does not make it the next page, however it looks.
fn other_parameter() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(r#"rel="prev""#.to_owned()),
        Just("rel=first".to_owned()),
        Just("rel".to_owned()),
        r#"title="[a-z <>;,='/]{0,20}""#.prop_map(|text| text),
        Just(r#"title="a \"; rel=next; \" b""#.to_owned()),
        Just(r#"title="</other>; rel=next""#.to_owned()),
        "[a-z]{1,4}=[a-z0-9]{0,4}".prop_filter("another name", |text| !text.starts_with("rel=")),
    ]
}

fn link(target: &str, parameters: &[String], space: &str) -> String {
    let parameters: Vec<String> = parameters.iter().map(|parameter| format!(";{space}{parameter}")).collect();
    format!("<{target}>{}", parameters.concat())
}

proptest! {
    #[test]
    fn the_next_page_is_never_of_another_origin(target in any_target(), before in any_value()) {
        let page = Url::parse(PAGE).unwrap();
        for value in [format!(r#"<{target}>; rel="next""#).into_bytes(), before] {
            if let Ok(Some(next)) = read::next_page(&headers(header::LINK, value), &page) {
                let origin = (next.scheme(), next.host_str(), next.port());
                prop_assert_eq!(origin, ("https", Some("r.example"), Some(8443)));
                prop_assert_eq!((next.username(), next.password()), ("", None));
            }
        }
    }

    #[test]
    fn the_next_page_is_found_among_other_links(
        before in vec(("/[a-z]{1,6}", vec(other_parameter(), 0..3)), 0..3),
        parameters in vec(other_parameter(), 0..2),
        relation in prop::sample::select(vec!["rel=next", "REL=\"next\"", "rel = \"prefetch next\"", "rel=\"NEXT\""]),
        (space, comma) in ("[ \t]{0,2}", prop::sample::select(vec![",", ", ", " ,  "])),
        (last, n) in ("[a-z]{1,6}", 1..1000_u32),
    ) {
        let target = format!("/v2/a/tags/list?last={last}&n={n}");
        let before = before.iter().map(|(target, parameters)| link(target, parameters, &space));
        let mut links: Vec<String> = before.collect();
        // Only the first `rel` of a link counts (RFC 8288, section 3.3).
        let others = parameters.into_iter().filter(|parameter| !parameter.starts_with("rel"));
        links.push(link(&target, &others.chain([relation.to_owned()]).collect::<Vec<_>>(), &space));
        let page = Url::parse(PAGE).unwrap();
        let next = read::next_page(&headers(header::LINK, links.join(comma)), &page);
        prop_assert_eq!(next, Ok(Some(page.join(&target).unwrap())), "{}", links.join(comma));
    }

    #[test]
    fn a_content_range_to_the_end_comes_back(start in any::<u64>(), len in 1..=u64::MAX) {
        let Some(total) = start.checked_add(len) else { return Ok(()) };
        let value = format!("bytes {start}-{}/{total}", total - 1);
        prop_assert_eq!(read::content_range(&headers(header::CONTENT_RANGE, value)), Some((start, total)));
    }

    #[test]
    fn a_content_range_is_not_guessed(start in any::<u64>(), end in any::<u64>(), total in any::<u64>()) {
        let value = format!("bytes {start}-{end}/{total}");
        let expected = (start <= end && end.checked_add(1) == Some(total)).then_some((start, total));
        prop_assert_eq!(read::content_range(&headers(header::CONTENT_RANGE, value)), expected);
    }

    #[test]
    fn the_bytes_of_a_session_come_back(
        stored in 2..=u64::MAX,
        prefix in prop::sample::select(vec!["", "bytes=", " "]),
    ) {
        let value = format!("{prefix}0-{}", stored - 1);
        prop_assert_eq!(read::stored_bytes(&headers(header::RANGE, value)), Some(stored));
    }

    /// A number that is read is one that stands there, or one more than one that does.
    #[test]
    fn no_number_is_read_that_is_not_there(
        near in "(bytes[ =])?[0-9+ -]{0,8}-[0-9 +]{0,6}(/[0-9*]{0,6})?",
        far in any_value(),
    ) {
        for value in [near.into_bytes(), far] {
            let text = String::from_utf8_lossy(&value).into_owned();
            let numbers = text.split(|c: char| !c.is_ascii_digit());
            let stands = |number: u64| numbers.clone().any(|digits| digits.parse() == Ok(number));
            if let Some(stored) = read::stored_bytes(&headers(header::RANGE, &value)) {
                prop_assert!(stored > 1 && stands(stored - 1), "{stored} of {text}");
            }
            if let Some((start, total)) = read::content_range(&headers(header::CONTENT_RANGE, &value)) {
                prop_assert!(start < total, "{start}/{total} of {text}");
                prop_assert!(stands(start) && stands(total - 1) && stands(total), "{start}/{total} of {text}");
            }
            let name = HeaderName::from_static("oci-chunk-min-length");
            if let Some(least) = read::chunk_min_length(&headers(name, &value)) {
                prop_assert!(stands(least), "{least} of {text}");
            }
        }
    }

    #[test]
    fn a_date_to_retry_after_is_read_to_the_second(
        now in 0..=4_000_000_000_i64,
        nanos in 0..1_000_000_000_i32,
        wait in -100_000..=10_000_000_i64,
    ) {
        let now = Timestamp::new(now, nanos).unwrap();
        let at = now + SignedDuration::from_secs(wait);
        let date = at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let read = read::retry_after(&headers(header::RETRY_AFTER, date), now).unwrap();
        let expected = Duration::try_from(SignedDuration::from_secs(wait)).unwrap_or_default();
        prop_assert!(read <= expected && expected < read + Duration::from_secs(1), "{read:?} for {expected:?}");
    }

    #[test]
    fn seconds_to_retry_after_come_back_and_other_text_does_not(seconds in any::<u64>(), other in any_value()) {
        let read = |value: &[u8]| read::retry_after(&headers(header::RETRY_AFTER, value), Timestamp::UNIX_EPOCH);
        prop_assert_eq!(read(seconds.to_string().as_bytes()), Some(Duration::from_secs(seconds)));
        let is_number = |text: &[u8]| text.trim_ascii().iter().all(u8::is_ascii_digit);
        prop_assert!(read(&other).is_none() || is_number(&other) || other.contains(&b':'), "{other:?}");
    }

    #[test]
    fn a_message_is_short_and_holds_no_query_and_no_control_characters(
        message in r"(\PC|[\x00-\x20\x7f-\xa0]|https://r\.example/a\?token=){0,300}",
        code in "[A-Z_]{0,70}|.{0,8}",
    ) {
        let body = serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string();
        let (code, message) = envelope::parse(body.as_bytes());
        let message = message.unwrap_or_default();
        prop_assert!(message.chars().count() <= 256 && !message.contains(char::is_control), "{message:?}");
        prop_assert!(!message.contains("token="), "{message}");
        let is_code = |code: &str| {
            (1..=64).contains(&code.len()) && code.chars().all(|c| c.is_ascii_uppercase() || c == '_')
        };
        prop_assert!(code.as_deref().is_none_or(is_code), "{code:?}");
    }

    #[test]
    fn a_body_that_is_no_envelope_says_nothing(body in vec(any::<u8>(), 0..64)) {
        prop_assert_eq!(envelope::parse(&body), (None, None));
    }
}
