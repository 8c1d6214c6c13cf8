//! What holds of challenges and Docker configurations for any text, found with texts that nobody wrote by hand.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::{collection::vec, prelude::*};
use serde_json::json;

use super::{Challenge, CredentialStore};

/// What a header value may hold besides letters.
const TEXT: &str = r#"[a-z0-9 :/?&=.,;\\"-]{0,20}"#;

#[derive(Clone, Debug)]
enum Written {
    Known(Challenge),
    /// A scheme that no client here can answer, with what follows it.
    Other(String),
}

fn written() -> impl Strategy<Value = Written> {
    let bearer = (TEXT, proptest::option::of(TEXT), proptest::option::of("[a-z_]{1,12}"));
    prop_oneof![
        Just(Written::Known(Challenge::Basic)),
        bearer.prop_map(|(realm, service, error)| Written::Known(Challenge::Bearer { realm, service, error })),
        Just(Written::Other("Negotiate".into())),
        "[A-Za-z0-9._~+/-]{1,12}={0,2}".prop_map(|token| Written::Other(format!("NTLM {token}"))),
        TEXT.prop_map(|nonce| Written::Other(format!("Digest nonce={}, qop=auth", quoted(&nonce)))),
    ]
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\""))
}

/// A value without quotes where it needs none and `bare` is set.
fn value(text: &str, bare: bool) -> String {
    let is_token = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
    if bare && is_token { text.to_owned() } else { quoted(text) }
}

fn render(written: &Written, bare: bool, space: &str) -> String {
    match written {
        Written::Other(text) => text.clone(),
        Written::Known(Challenge::Basic) => format!("bAsIc realm={}", quoted("R, Bearer realm=\"x\"")),
        Written::Known(Challenge::Bearer { realm, service, error }) => {
            let pairs = [("realm", Some(realm)), ("Service", service.as_ref()), ("ERROR", error.as_ref())];
            let pairs =
                pairs.iter().filter_map(|(name, text)| Some(format!("{name}{space}={space}{}", value((*text)?, bare))));
            format!("Bearer {}", pairs.collect::<Vec<_>>().join(&format!("{space},{space}")))
        }
    }
}

proptest! {
    #[test]
    fn challenges_come_back_however_they_are_written(
        written in vec((written(), any::<bool>()), 0..5),
        space in "[ \t]{0,2}",
        comma in prop::sample::select(vec![",", ", ", " ,\t", ",,"]),
    ) {
        let header = written.iter().map(|(one, bare)| render(one, *bare, &space)).collect::<Vec<_>>().join(comma);
        let known = written.into_iter().filter_map(|(one, _)| match one {
            Written::Known(challenge) => Some(challenge),
            Written::Other(_) => None,
        });
        prop_assert_eq!(Challenge::parse(&header), known.collect::<Vec<_>>(), "{}", header);
    }

    /// A challenge takes at least its scheme's name, so that text cannot hold more of them than that.
    #[test]
    fn any_text_has_no_more_challenges_than_it_has_room_for(
        text in r#"((?i:basic|bearer)|realm|[ ,="\\/;\t]|\PC){0,40}"#,
    ) {
        let challenges = Challenge::parse(&text);
        prop_assert!(challenges.len() * "basic".len() <= text.len());
        for challenge in challenges {
            if let Challenge::Bearer { realm, .. } = challenge {
                prop_assert!(realm.chars().all(|c| text.contains(c)));
            }
        }
    }

    #[test]
    fn what_a_docker_configuration_says_is_used(
        user in "[^:\0]{1,12}",
        password in "[^\0]{1,12}",
        encoded in any::<bool>(),
    ) {
        let auth = STANDARD.encode(format!("{user}:{password}"));
        let entry = if encoded { json!({"auth": auth}) } else { json!({"username": user, "password": password}) };
        let config = json!({"auths": {"r.example": entry}}).to_string();
        let store = CredentialStore::from_docker_config_json(config.as_bytes(), "x").unwrap();
        let found = store.matching(&"r.example".parse().unwrap(), &"a/b".parse().unwrap());
        prop_assert_eq!(found.iter().map(|credential| credential.username()).collect::<Vec<_>>(), [&user[..]]);
        prop_assert!(store.matching(&"s.example".parse().unwrap(), &"a/b".parse().unwrap()).is_empty());
    }

    /// `hunter2` is written in every place where a secret may be, and in some where it may not.
    #[test]
    fn a_broken_docker_configuration_is_never_repeated(
        key in r"[a-z*?\[\]./:@ -]{0,12}",
        (before, after) in ("[ -9;-~]{0,6}", "[ -~]{0,6}"),
        cut in any::<prop::sample::Index>(),
    ) {
        // Before the colon would be a user name, which is none.
        let secret = format!("{before}:hunter2{after}");
        for entry in [json!({"auth": secret}), json!({"auth": STANDARD.encode(&secret)}),
            json!({"password": secret}), json!(secret), json!([secret])] {
            let whole = json!({"auths": {&key: entry}}).to_string();
            let text = &whole[..cut.index(whole.len() + 1)];
            for config in [&whole, text] {
                for read in [CredentialStore::from_docker_config_json, CredentialStore::from_docker_cfg] {
                    let printed = match read(config.as_bytes(), "x") {
                        Ok(store) => format!("{store:?}"),
                        Err(error) => format!("{error} {error:?}"),
                    };
                    prop_assert!(!printed.contains("hunter2"), "{}", printed);
                }
            }
        }
    }

    #[test]
    fn any_key_is_read_or_refused(key in r"(https?://)?[a-z*?\[\]!./:@-]{0,24}") {
        let config = json!({"auths": {key: {"username": "u", "password": "p"}}}).to_string();
        if let Ok(store) = CredentialStore::from_docker_config_json(config.as_bytes(), "x") {
            let found = store.matching(&"r.example:5000".parse().unwrap(), &"a/b".parse().unwrap());
            prop_assert!(found.len() <= 1);
        }
    }
}
