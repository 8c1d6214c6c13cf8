//! `WWW-Authenticate` (RFC 9110, section 11.6.1): what a registry asks for with a 401.

use std::collections::BTreeMap;

/// One challenge that the client can answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// User name and password with every request (RFC 7617).
    Basic,
    /// A token from the server at `realm` (distribution-spec, token authentication).
    Bearer {
        /// The URL of the token server, as text.
        realm: String,
        /// The audience to name in the token request.
        service: Option<String>,
        /// Why a token that was sent does not do, such as `insufficient_scope`.
        error: Option<String>,
    },
}

impl Challenge {
    /// Reads one header value, which may hold several challenges. Unknown schemes are left out.
    #[must_use]
    pub fn parse(header: &str) -> Vec<Self> {
        let mut rest = header;
        let mut challenges = Vec::new();
        while let Some((scheme, after)) = token(rest) {
            let (mut params, remaining) = match skip_token68(after) {
                Some(remaining) => (BTreeMap::new(), remaining),
                None => parameters(after),
            };
            rest = remaining.trim_start_matches([' ', '\t', ',']);
            match scheme.to_ascii_lowercase().as_str() {
                "basic" => challenges.push(Self::Basic),
                "bearer" => {
                    if let Some(realm) = params.remove("realm") {
                        challenges.push(Self::Bearer {
                            realm,
                            service: params.remove("service"),
                            error: params.remove("error"),
                        });
                    }
                }
                _ => {}
            }
            if rest.len() >= after.len() {
                break;
            }
        }
        challenges
    }
}

fn is_token_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

/// A token at the start of the text, and what follows it.
fn token(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start_matches([' ', '\t', ',']);
    let end = text.find(|c| !is_token_char(c)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// What follows a `token68` (RFC 9110, section 11.2), which is what `Negotiate` has in place of parameters.
fn skip_token68(text: &str) -> Option<&str> {
    let token = text.strip_prefix(' ')?.trim_start_matches(' ');
    let after = token.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c));
    let rest = after.trim_start_matches('=').trim_start_matches([' ', '\t']);
    (after.len() < token.len() && (rest.is_empty() || rest.starts_with(','))).then_some(rest)
}

/// `name=value` pairs up to the next scheme, and what follows them. The first of two equal names counts.
fn parameters(mut text: &str) -> (BTreeMap<String, String>, &str) {
    let mut params = BTreeMap::new();
    loop {
        let Some((name, after)) = token(text) else { return (params, text) };
        let Some(after) = after.trim_start().strip_prefix('=') else { return (params, text) };
        let after = after.trim_start();
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted_string(quoted),
            None => {
                let end = after.find([',', ' ', '\t']).unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            }
        };
        params.entry(name.to_ascii_lowercase()).or_insert(value);
        text = after;
    }
}

/// The content of a quoted string whose opening quote has been taken, and what follows the closing one.
fn quoted_string(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer { realm: realm.into(), service: service.map(Into::into), error: None }
    }

    #[test]
    fn challenges_are_read_in_every_form_that_is_seen() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        assert_eq!(Challenge::parse(hub), [bearer("https://auth.docker.io/token", Some("registry.docker.io"))]);
        assert_eq!(Challenge::parse(r#"Basic realm="Registry Realm""#), [Challenge::Basic]);
        assert_eq!(Challenge::parse("basic"), [Challenge::Basic]);
        assert_eq!(
            Challenge::parse(r#"Negotiate, Bearer realm="https://a/t" , Basic realm="b""#),
            [bearer("https://a/t", None), Challenge::Basic]
        );
        assert_eq!(Challenge::parse("Negotiate basic/4==, Basic"), [Challenge::Basic]);
        assert_eq!(Challenge::parse("BEARER Realm=https://a/t, service=x"), [bearer("https://a/t", Some("x"))]);
        assert_eq!(Challenge::parse(r#"Bearer realm="a\"b""#), [bearer("a\"b", None)]);
    }

    #[test]
    fn broken_challenges_are_left_out() {
        for bad in ["", ",,,", "Bearer", r#"Bearer service="x""#, "=", "\"", "Digest realm=x"] {
            assert_eq!(Challenge::parse(bad), [], "{bad}");
        }
        assert_eq!(Challenge::parse(r#"Bearer realm="https://unterminated"#), [bearer("https://unterminated", None)]);
    }
}
