//! The headers of the protocol, read strictly: what does not have its form is as if it were not there. Pure.

use std::time::Duration;

use http::{
    HeaderMap,
    header::{CONTENT_RANGE, HeaderName, LINK, RANGE, RETRY_AFTER},
};
use url::Url;

use super::spacing::Quota;

use crate::oci::Digest;

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
const RATE_LIMIT_REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
const CHUNK_MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// `Docker-Content-Digest` (distribution-spec, "Pulling manifests").
#[must_use]
pub fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    text(headers, CONTENT_DIGEST)?.parse().ok()
}

/// Whether `OCI-Subject` says that the registry lists a manifest by its subject (distribution-spec, "Pushing Manifests
/// with Subject").
#[must_use]
pub fn lists_by_subject(headers: &HeaderMap) -> bool {
    headers.contains_key(SUBJECT)
}

/// Start and total of `Content-Range: bytes start-end/total` that reaches to the end (RFC 9110, section 14.4).
#[must_use]
pub fn content_range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let (range, total) = text(headers, CONTENT_RANGE)?.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end, total) = (number(start)?, number(end)?, number(total)?);
    (start <= end && end.checked_add(1)? == total).then_some((start, total))
}

/// How many bytes an upload session holds by its `Range: 0-end` (distribution-spec, "Pushing a blob in chunks").
///
/// `0-0` says nothing: some registries write it for one byte and for none.
#[must_use]
pub fn stored_bytes(headers: &HeaderMap) -> Option<u64> {
    let range = text(headers, RANGE)?;
    let (start, end) = range.strip_prefix("bytes=").unwrap_or(range).split_once('-')?;
    let (start, end) = (number(start)?, number(end)?);
    (start == 0 && end > 0).then(|| end.checked_add(1))?
}

/// `OCI-Chunk-Min-Length` in bytes (distribution-spec, "Pushing a blob in chunks").
#[must_use]
pub fn chunk_min_length(headers: &HeaderMap) -> Option<u64> {
    number(text(headers, CHUNK_MIN_LENGTH)?)
}

/// `Retry-After` in seconds or as a date, seen from `now` (RFC 9110, section 10.2.3). A date that is past is zero.
#[must_use]
pub fn retry_after(headers: &HeaderMap, now: jiff::Timestamp) -> Option<Duration> {
    let text = text(headers, RETRY_AFTER)?;
    if let Some(seconds) = number(text) {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    Some(at.duration_since(now).try_into().unwrap_or(Duration::ZERO))
}

/// `RateLimit-Remaining: 76;w=21600` beside `RateLimit-Limit: 100;w=21600`: what is left of a quota in a window of so many
/// seconds (draft-ietf-httpapi-ratelimit-headers, as Docker Hub writes it).
#[must_use]
pub fn quota(headers: &HeaderMap) -> Option<Quota> {
    let read = |name| {
        let mut parts = text(headers, name)?.split(';').map(str::trim);
        let count = number(parts.next()?)?;
        Some((count, parts.find_map(|part| number(part.strip_prefix("w=")?))))
    };
    let (left, window) = read(RATE_LIMIT_REMAINING)?;
    let whole = read(RATE_LIMIT).and_then(|(limit, of_limit)| Some((limit, Duration::from_secs(of_limit.or(window)?))));
    Some(Quota { left, whole })
}

/// The page after the one at `page`, by `Link: <url>; rel="next"` (RFC 8288). An error holds the host of a page that is
/// elsewhere: lists are read where they were asked for and nowhere else.
pub fn next_page(headers: &HeaderMap, page: &Url) -> Result<Option<Url>, String> {
    for value in headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok()) {
        let Some(next) = links(value).into_iter().find(|(_, is_next)| *is_next) else { continue };
        let Ok(mut url) = page.join(next.0) else { continue };
        // The origin of a `blob:` URL is that of the URL inside.
        if url.origin() != page.origin() || url.scheme() != page.scheme() {
            return Err(url.host_str().unwrap_or(url.scheme()).to_owned());
        }
        // Our login is sent with the request, not one that the registry writes into the address.
        if url.set_username("").is_ok() && url.set_password(None).is_ok() {
            return Ok(Some(url));
        }
    }
    Ok(None)
}

/// The targets of a `Link` value, and whether each is the next page.
fn links(mut value: &str) -> Vec<(&str, bool)> {
    let mut found = Vec::new();
    while let Some((_, after)) = value.split_once('<') {
        let Some((target, after)) = after.split_once('>') else { break };
        let (mut parameters, after) = split_unquoted(after, &['<']);
        let mut is_next = false;
        while !parameters.is_empty() {
            let (parameter, others) = split_unquoted(parameters, &[';', ',']);
            is_next |= parameter.split_once('=').is_some_and(|(name, value)| is_next_relation(name, value));
            parameters = others.get(1..).unwrap_or_default();
        }
        found.push((target, is_next));
        value = after;
    }
    found
}

fn is_next_relation(name: &str, value: &str) -> bool {
    let relations = value.trim().trim_matches('"');
    name.trim().eq_ignore_ascii_case("rel")
        && relations.split(' ').any(|relation| relation.eq_ignore_ascii_case("next"))
}

/// The text before the first of these characters that is not in a quoted string (RFC 9110, section 5.6.4), and the
/// rest, which begins with it.
fn split_unquoted<'a>(text: &'a str, wanted: &[char]) -> (&'a str, &'a str) {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let end = text.find(|c| {
        let is_end = !is_quoted && wanted.contains(&c);
        is_quoted ^= c == '"' && !is_escaped;
        is_escaped = c == '\\' && is_quoted && !is_escaped;
        is_end
    });
    text.split_at(end.unwrap_or(text.len()))
}

/// Digits alone: `parse` would take a plus sign too.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn content_ranges_must_reach_to_the_end() {
        let read = |value: &str| content_range(&headers(CONTENT_RANGE, value));
        assert_eq!(read("bytes 5-9/10"), Some((5, 10)));
        for bad in ["", "bytes 5-9/*", "bytes 5-8/10", "bytes 9-5/10", "5-9/10", "bytes */10", "bytes +5-9/10"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(read("bytes 0-18446744073709551615/0"), None);
    }

    #[test]
    fn a_session_says_how_many_bytes_it_holds_unless_that_is_ambiguous() {
        let read = |value: &str| stored_bytes(&headers(RANGE, value));
        assert_eq!(read("0-1023"), Some(1024));
        assert_eq!(read("bytes=0-9"), Some(10));
        for bad in ["0-0", "", "1-9", "0-", "-5", "0-x", "0--1", "0-18446744073709551615"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        let now: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let read = |value: &str| retry_after(&headers(RETRY_AFTER, value), now);
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("Thu, 01 Jan 2026 00:01:00 GMT"), Some(Duration::from_mins(1)));
        assert_eq!(read("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        for bad in ["soon", "-1", "1.5", ""] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_quota_is_read_with_and_without_its_window() {
        let read = |left: &str, limit: &str| {
            let mut both = headers(RATE_LIMIT_REMAINING, left);
            both.extend(headers(RATE_LIMIT, limit));
            quota(&both)
        };
        let of = |left, limit| Some(Quota { left, whole: Some((limit, Duration::from_hours(6))) });
        assert_eq!((read("76;w=21600", "100;w=21600"), read("0 ; w=21600", "200")), (of(76, 100), of(0, 200)));
        for no_window in
            [read("7", "100"), read("7", ""), read("7", "many;w=1"), quota(&headers(RATE_LIMIT_REMAINING, "7"))]
        {
            assert_eq!(no_window, Some(Quota { left: 7, whole: None }));
        }
        for bad in ["", ";w=21600", "-1", "many", "+1"] {
            assert_eq!(read(bad, "100;w=21600"), None, "{bad}");
        }
    }

    #[test]
    fn the_next_page_is_at_the_same_host_or_refused() {
        let page: Url = "https://r.example/v2/a/tags/list?n=2".parse().unwrap();
        let read = |value: &str| next_page(&headers(LINK, value), &page);
        let next: Url = "https://r.example/v2/a/tags/list?last=b&n=2".parse().unwrap();
        for good in [
            r#"</v2/a/tags/list?last=b&n=2>; rel="next""#,
            "<https://r.example/v2/a/tags/list?last=b&n=2>;REL=next",
            r#"</first>; rel="first", </v2/a/tags/list?last=b&n=2>; title="x"; rel="prefetch next""#,
            r#"</v2/a/tags/list?last=b&n=2>; title="</x>; rel=prev, \"<"; rel="next""#,
            r#"</first>; title="a; rel=next", </v2/a/tags/list?last=b&n=2>; rel="next""#,
            r#"<https://u:p@r.example/v2/a/tags/list?last=b&n=2>; rel="next""#,
        ] {
            assert_eq!(read(good), Ok(Some(next.clone())), "{good}");
        }
        for none in [r#"</v2/a>; rel="prev""#, "</v2/a>", "", "<", r#"<:::>; rel="next""#] {
            let found = read(none);
            assert!(matches!(found, Ok(None)) || none.starts_with("<:"), "{none}: {found:?}");
        }
        assert_eq!(read(r#"<https://evil.example/x>; rel="next""#), Err("evil.example".into()));
        assert_eq!(read(r#"<http://r.example/x>; rel="next""#), Err("r.example".into()));
        assert_eq!(read(r#"<blob:https://r.example/x>; rel="next""#), Err("blob".into()));
    }
}
