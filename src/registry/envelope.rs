//! What registries say of an error (distribution-spec, "Error Codes"), and what it stands for where other words would be right.

use serde::Deserialize;

#[derive(Deserialize)]
struct Envelope {
    errors: Vec<EnvelopeError>,
}

#[derive(Deserialize)]
struct EnvelopeError {
    code: Option<String>,
    message: Option<String>,
    detail: Option<serde_json::Value>,
}

/// What we call it when a registry says in a general error that its disk is full.
pub(super) const NO_SPACE: &str = "NO_SPACE";
/// What we call it when a registry says in a general error that it takes no manifest with these `urls`.
pub(super) const URLS_REFUSED: &str = "URLS_REFUSED";
/// What we call it when a registry says in a refusal that there is no such repository, and that it is not made by a push.
pub(super) const NO_REPOSITORY: &str = "NO_REPOSITORY";
/// Words, all of them in one message, that say more than the code beside it, and the code that they stand for.
const TELLING_WORDS: [(&[&str], &str); 7] = [
    (&["no space left on device"], NO_SPACE),
    (&["invalid URL on layer"], URLS_REFUSED),
    // Harbor says DENIED to what its quota of a project does not allow, Amazon to a password of yesterday.
    (&["Quota exceeded when processing"], "QUOTA_EXCEEDED"),
    (&["authorization token has expired"], UNAUTHORIZED),
    // Harbor, with 401 or 404; GitHub with 403, to tokens of people and to those of workflows.
    (&["project ", " not found"], NO_REPOSITORY),
    (&["permission_denied: create_package"], NO_REPOSITORY),
    (&["not allowed to Create organization package"], NO_REPOSITORY),
];
/// Who asks is not known (distribution-spec, "Error Codes").
pub(super) const UNAUTHORIZED: &str = "UNAUTHORIZED";

/// The first code and message of an error body (distribution-spec, "Error Codes"). Other bodies say nothing.
pub(super) fn parse(body: &[u8]) -> (Option<String>, Option<String>) {
    let Ok(Envelope { errors }) = serde_json::from_slice(body) else { return (None, None) };
    // What went wrong is often in a detail alone, and sometimes in that of another error.
    let detail = errors.iter().find_map(|error| match &error.detail {
        Some(serde_json::Value::String(text)) => Some(text.clone()),
        _ => None,
    });
    let Some(first) = errors.into_iter().next() else { return (None, None) };
    let is_code =
        |code: &String| (1..=64).contains(&code.len()) && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    let words: Vec<String> = [first.message, detail].into_iter().flatten().collect();
    let message = Some(clean(&words.join(": "))).filter(|message| !message.is_empty());
    let says = |words: &[&str]| message.as_ref().is_some_and(|message| words.iter().all(|word| message.contains(word)));
    let told = TELLING_WORDS.iter().find(|(words, _)| says(words));
    let code = told.map(|(_, code)| (*code).to_owned()).or(first.code.filter(is_code));
    (code, message)
}

/// At most 256 characters, none of them control characters, and no query strings.
pub(super) fn clean(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let words: String = printable.collect();
    let without_queries = words.split(' ').map(|word| word.split_once('?').map_or(word, |(before, _)| before));
    without_queries.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ").chars().take(256).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_no_query_and_no_control_characters() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\naccess to https://x/y?token=hunter2 here"}]}"#;
        let (code, message) = parse(body);
        assert_eq!(code.as_deref(), Some("DENIED"));
        assert_eq!(message.as_deref(), Some("no access to https://x/y here"));
        assert_eq!(parse(br#"{"errors":[{"code":"","message":"?"}]}"#), (None, None));
        assert_eq!(parse(b"<html>secret</html>"), (None, None));
    }
}
