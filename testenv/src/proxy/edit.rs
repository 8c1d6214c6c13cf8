//! What rules change in the words of a request or an answer: headers, the query, the status, and bodies with the length
//! that is told. Cuts, stalls and flipped bytes are the body's own matter.

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header, request, response};
use http_body_util::BodyExt;
use hyper::body::Frame;

use super::action::Action;
use super::body::Body;
use super::forward::full;

/// Headers and query of a request on its way to the upstream.
pub(super) fn request(parts: &mut request::Parts, actions: &[Action]) {
    for action in actions {
        match action {
            Action::SetRequestHeader { name, value } => set(&mut parts.headers, name, value),
            Action::RemoveRequestHeader(name) => drop(parts.headers.remove(name)),
            Action::RemoveQuery(name) => {
                if let Some(uri) = without_query(&parts.uri, name) {
                    parts.uri = uri;
                }
            }
            _ => {}
        }
    }
}

/// The status of an answer; one that is none is left out.
pub(super) fn status(parts: &mut response::Parts, actions: &[Action]) {
    for action in actions {
        if let Action::SetStatus(status) = action
            && let Ok(status) = StatusCode::from_u16(*status)
        {
            parts.status = status;
        }
    }
}

/// The body of an answer, with the length that it will have. The answer of a HEAD has the length alone.
pub(super) fn body(parts: &mut response::Parts, mut body: Body, is_head: bool, actions: &[Action]) -> Body {
    let told = |headers: &HeaderMap| headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse::<u64>().ok();
    for action in actions {
        let (changed, length) = match action {
            Action::ReplaceBody(bytes) => (full(bytes.clone()), Some(bytes.len() as u64)),
            Action::AppendBody(bytes) => {
                let length = told(&parts.headers).map(|length| length + bytes.len() as u64);
                (append(body, full(bytes.clone())), length)
            }
            Action::DropLines(part) => {
                parts.headers.remove(header::CONTENT_LENGTH);
                (without_lines(body, part.clone()), None)
            }
            Action::TruncateBody { after } => (body, told(&parts.headers).map(|length| length.min(*after))),
            _ => continue,
        };
        body = if is_head { full("") } else { changed };
        if let Some(length) = length {
            parts.headers.insert(header::CONTENT_LENGTH, length.into());
        }
    }
    body
}

/// Headers of an answer.
pub(super) fn headers(parts: &mut response::Parts, actions: &[Action]) {
    for action in actions {
        match action {
            Action::MoveLocation(base) => {
                if let Some(location) = parts.headers.get(header::LOCATION).and_then(|location| moved(location, base)) {
                    parts.headers.insert(header::LOCATION, location);
                }
            }
            Action::SetHeader { name, value } => set(&mut parts.headers, name, value),
            Action::RemoveHeader(name) => drop(parts.headers.remove(name)),
            _ => {}
        }
    }
}

fn set(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
        headers.insert(name, value);
    }
}

fn append(first: Body, second: Body) -> Body {
    let bodies = futures::stream::iter([first, second]);
    let frames = futures::StreamExt::flat_map(bodies, BodyExt::into_data_stream);
    let frames = futures::TryStreamExt::map_ok(frames, Frame::data);
    http_body_util::StreamBody::new(frames).boxed_unsync()
}

/// Line by line, because a watch has no end; a line comes as soon as it is whole.
fn without_lines(body: Body, part: String) -> Body {
    let state = (body, Vec::new(), part);
    let frames = futures::stream::unfold(state, |(mut body, mut rest, part)| async {
        loop {
            let frame = match body.frame().await {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Some((Err(error), (body, rest, part))),
                None if rest.is_empty() => return None,
                None => {
                    let last = Frame::data(std::mem::take(&mut rest).into());
                    return Some((Ok(last), (body, rest, part)));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            rest.extend_from_slice(&data);
            let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            let lines: Vec<u8> = rest.drain(..whole).collect();
            let is_kept = |line: &&[u8]| !String::from_utf8_lossy(line).contains(&part);
            let kept: Vec<u8> =
                lines.split_inclusive(|byte| *byte == b'\n').filter(is_kept).flatten().copied().collect();
            if !kept.is_empty() {
                return Some((Ok(Frame::data(kept.into())), (body, rest, part)));
            }
        }
    });
    http_body_util::StreamBody::new(frames).boxed_unsync()
}

fn without_query(uri: &Uri, name: &str) -> Option<Uri> {
    let is_kept = |pair: &&str| pair.split('=').next() != Some(name);
    let query: Vec<&str> = uri.query()?.split('&').filter(is_kept).collect();
    let path = uri.path();
    let text = if query.is_empty() { path.to_owned() } else { format!("{path}?{}", query.join("&")) };
    Some(Uri::from(PathAndQuery::try_from(text).ok()?))
}

fn moved(location: &HeaderValue, base: &str) -> Option<HeaderValue> {
    let uri: Uri = location.to_str().ok()?.parse().ok()?;
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    HeaderValue::try_from(format!("{}{path}", base.trim_end_matches('/'))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_loses_one_name_and_keeps_the_others() {
        let uri: Uri = "/v2/a/blobs/uploads/?mount=sha256:1&from=b&x=1".parse().unwrap();
        assert_eq!(without_query(&uri, "mount").unwrap(), "/v2/a/blobs/uploads/?from=b&x=1");
        let uri: Uri = "/v2/a/blobs/uploads/?mount=sha256:1".parse().unwrap();
        assert_eq!(without_query(&uri, "mount").unwrap(), "/v2/a/blobs/uploads/");
    }

    #[test]
    fn a_location_moves_with_its_path_and_query() {
        for location in ["https://a:1/v2/x?y=z", "/v2/x?y=z"] {
            let moved = moved(&HeaderValue::from_static(location), "http://b:2").unwrap();
            assert_eq!(moved, "http://b:2/v2/x?y=z");
        }
    }
}
