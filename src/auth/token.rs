//! Bearer tokens (distribution-spec, token authentication): one fetch per key at a time, renewed at 80 % of life.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::SecretString;
use serde::Deserialize;
use tokio::sync::Mutex as AsyncMutex;

use super::{Credential, Issued, slots::Slots};
use crate::oci::{Digest, RepositoryName};

/// What the specification says of tokens that do not name their life.
const DEFAULT_LIFE: Duration = Duration::from_mins(1);

/// What a token is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Read from a repository.
    Pull(RepositoryName),
    /// Read from and write to a repository.
    PullPush(RepositoryName),
    /// The same, and delete: what some registries want for giving up an upload.
    Delete(RepositoryName),
    /// Read from and write to the first, and read from the second: what mounting a blob of it needs.
    Mount(RepositoryName, RepositoryName),
}

impl Scope {
    /// The values of the `scope` parameters to ask for it with, one for each repository.
    #[must_use]
    pub fn parameters(&self) -> Vec<String> {
        match self {
            Self::Pull(name) => vec![format!("repository:{name}:pull")],
            Self::PullPush(name) => vec![format!("repository:{name}:pull,push")],
            Self::Delete(name) => vec![format!("repository:{name}:pull,push,delete")],
            Self::Mount(to, from) => vec![format!("repository:{to}:pull,push"), format!("repository:{from}:pull")],
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.parameters().join(" "))
    }
}

/// What a token is valid for. Two tenants never share one, unless host, transport and credential are all equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TokenKey {
    /// The registry with its transport: host, TLS or not, CA, client certificate.
    pub registry: String,
    /// The fingerprint of the credential; `None` is anonymous.
    pub credential: Option<Digest>,
    /// What the token is for.
    pub scope: Scope,
}

/// A bearer token and when to renew it.
#[derive(Clone)]
pub struct Token {
    value: SecretString,
    renew_at: Instant,
    /// What to log in with next time, where the server gave a new identity token.
    refresh: Option<SecretString>,
    /// What the answer says that it grants.
    scope: Option<String>,
}

/// What a token lets somebody do with a repository.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Grant {
    #[serde(rename = "type")]
    kind: String,
    /// The repository.
    pub name: String,
    /// Such as `pull` and `push`; `*` is all.
    pub actions: Vec<String>,
}

/// An answer of a token server that is not a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the token server's answer holds no token")]
pub struct TokenError;

#[derive(Deserialize)]
struct Answer {
    token: Option<SecretString>,
    access_token: Option<SecretString>,
    refresh_token: Option<SecretString>,
    expires_in: Option<u64>,
    scope: Option<String>,
}

/// What a token says of itself (distribution-spec, "Token Authentication Implementation").
#[derive(Deserialize)]
struct Claims {
    access: Option<Vec<Grant>>,
}

impl Token {
    /// Reads the body of a token server's answer that arrived at `now`. The server's own clock is not looked at.
    pub fn from_answer(body: &[u8], now: Instant) -> Result<Self, TokenError> {
        use secrecy::ExposeSecret;
        let answer: Answer = serde_json::from_slice(body).map_err(|_| TokenError)?;
        let value = [answer.token, answer.access_token]
            .into_iter()
            .flatten()
            .find(|value| !value.expose_secret().is_empty())
            .ok_or(TokenError)?;
        let life = answer.expires_in.map_or(DEFAULT_LIFE, |seconds| Duration::from_secs(seconds.clamp(1, 86_400)));
        let refresh = answer.refresh_token.filter(|token| !token.expose_secret().is_empty());
        Ok(Self { value, renew_at: now + life.mul_f64(0.8), refresh, scope: answer.scope })
    }

    /// Whether it is not time to renew it.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        Instant::now() < self.renew_at
    }

    /// The identity token that came with it, to log in with the next time.
    #[must_use]
    pub fn refresh(&self) -> Option<&SecretString> {
        self.refresh.as_ref()
    }

    /// What it grants, where it or the answer that it came with says so: for messages, as the registry alone decides.
    #[must_use]
    pub fn grants(&self) -> Option<Vec<Grant>> {
        use secrecy::ExposeSecret;
        let payload = self.value.expose_secret().split('.').nth(1).map(|part| part.trim_end_matches('='));
        let claims = payload.and_then(|payload| URL_SAFE_NO_PAD.decode(payload).ok());
        let claims: Option<Claims> = claims.and_then(|claims| serde_json::from_slice(&claims).ok());
        let of_answer = || Some(self.scope.as_ref()?.split(' ').filter_map(Grant::parse).collect());
        let grants: Vec<Grant> = claims.and_then(|claims| claims.access).or_else(of_answer)?;
        Some(grants.into_iter().filter(|grant| grant.kind == "repository").collect())
    }

    /// The value of an `Authorization` header (RFC 6750).
    #[must_use]
    pub fn bearer(&self) -> SecretString {
        use secrecy::ExposeSecret;
        format!("Bearer {}", self.value.expose_secret()).into()
    }
}

impl Grant {
    /// Reads `repository:NAME:ACTIONS`.
    fn parse(scope: &str) -> Option<Self> {
        let (rest, actions) = scope.rsplit_once(':')?;
        let (kind, name) = rest.split_once(':')?;
        let actions = actions.split(',').map(str::to_owned).collect();
        Some(Self { kind: kind.to_owned(), name: name.to_owned(), actions })
    }

    /// Whether it allows this.
    #[must_use]
    pub fn allows(&self, action: &str) -> bool {
        self.actions.iter().any(|granted| granted == action || granted == "*")
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.kind, self.name, self.actions.join(","))
    }
}

/// What to log in with next: the identity token of a credential, or the one that a server has given in its place. Locked
/// while it is shown, as a server may take each of them once.
pub type NextLogin = Arc<AsyncMutex<Arc<Credential>>>;

/// The logins and tokens of the process.
pub struct TokenCache {
    tokens: Slots<TokenKey, Token>,
    issued: Slots<LoginKey, Login>,
    /// As long as the process runs.
    next: Mutex<HashMap<LoginKey, NextLogin>>,
}

/// A registry with its transport, and the fingerprint of a credential.
type LoginKey = (String, Digest);

/// A login that was issued, and when.
#[derive(Clone)]
struct Login {
    credential: Arc<Credential>,
    issued_at: Instant,
    renew_at: Instant,
}

impl Default for TokenCache {
    fn default() -> Self {
        Self {
            tokens: Slots::new(Token::is_fresh),
            issued: Slots::new(|login| Instant::now() < login.renew_at),
            next: Mutex::default(),
        }
    }
}

impl TokenCache {
    /// The token for `key`, fetched if there is none that is fresh. Whoever asks meanwhile waits for the same fetch.
    ///
    /// `refused` is a token that the registry has just refused: it is not returned again.
    pub async fn get<F, Fut, E>(&self, key: TokenKey, refused: Option<&Token>, fetch: F) -> Result<Token, E>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Token, E>>,
    {
        self.tokens.get(key, |token| refused.is_none_or(|refused| !refused.is_same(token)), fetch).await
    }

    /// The login that a credential is exchanged for at this registry, by one exchange at a time, and again at 80 % of its
    /// life. One from before `since` is not returned again: it has just been refused.
    pub async fn issued<F, Fut, E>(
        &self,
        registry: &str,
        credential: &Credential,
        since: Option<Instant>,
        exchange: F,
    ) -> Result<Arc<Credential>, E>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Issued, E>>,
    {
        let fetch = || async {
            let issued_at = Instant::now();
            let Issued { credential, life } = exchange().await?;
            Ok(Login { credential, issued_at, renew_at: issued_at + life.mul_f64(0.8) })
        };
        let is_new = |login: &Login| since.is_none_or(|since| login.issued_at >= since);
        let key = (registry.to_owned(), credential.fingerprint().clone());
        Ok(self.issued.get(key, is_new, fetch).await?.credential)
    }

    /// The login that was last issued for a credential.
    #[must_use]
    pub fn last_issued(&self, registry: &str, credential: &Credential) -> Option<Arc<Credential>> {
        let key = (registry.to_owned(), credential.fingerprint().clone());
        self.issued.peek(&key).map(|login| login.credential)
    }

    /// What became of this identity token at this registry.
    #[must_use]
    pub fn next_login(&self, registry: &str, credential: &Arc<Credential>) -> NextLogin {
        let mut logins = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if logins.len() >= Self::MAX_LOGINS {
            logins.retain(|_, login| Arc::strong_count(login) > 1);
        }
        let key = (registry.to_owned(), credential.fingerprint().clone());
        Arc::clone(logins.entry(key).or_insert_with(|| Arc::new(AsyncMutex::new(Arc::clone(credential)))))
    }

    const MAX_LOGINS: usize = 4096;
}

impl Token {
    fn is_same(&self, other: &Self) -> bool {
        use secrecy::ExposeSecret;
        self.value.expose_secret() == other.value.expose_secret()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use secrecy::ExposeSecret as _;

    use super::*;

    fn token(text: &str) -> Token {
        Token::from_answer(text.as_bytes(), Instant::now()).unwrap()
    }

    fn key() -> TokenKey {
        TokenKey { registry: "r".into(), credential: None, scope: Scope::Pull("a".parse().unwrap()) }
    }

    #[test]
    fn answers_in_both_forms_are_read_and_others_are_refused() {
        assert!(token(r#"{"token":"a","expires_in":300}"#).is_same(&token(r#"{"access_token":"a"}"#)));
        assert!(token(r#"{"token":"","access_token":"b"}"#).is_same(&token(r#"{"token":"b"}"#)));
        for bad in ["", "{}", "<html>", r#"{"token":""}"#, r#"{"token":7}"#] {
            assert!(Token::from_answer(bad.as_bytes(), Instant::now()).is_err(), "{bad}");
        }
    }

    #[test]
    fn four_fifths_of_a_life_are_used_and_one_that_is_not_said_is_a_minute() {
        for (said, seconds) in [("300", 240.0), ("null", 48.0), ("0", 0.8), ("99999999", 69_120.0)] {
            let (now, answer) = (Instant::now(), format!(r#"{{"token":"a","expires_in":{said}}}"#));
            let token = Token::from_answer(answer.as_bytes(), now).unwrap();
            assert_eq!(token.renew_at - now, Duration::from_secs_f64(seconds), "{said}");
        }
    }

    #[test]
    fn what_a_token_grants_is_said_by_itself_or_by_its_answer() {
        let signed = |claims: &str| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
        let all = r#"{"access":[{"type":"registry","name":"catalog","actions":["*"]},{"type":"repository","name":"a/b","actions":["pull","push"]}]}"#;
        for (value, scope, expected) in [
            (signed(all), None, Some("repository:a/b:pull,push")),
            (signed(r#"{"access":[]}"#), Some("repository:a:pull"), Some("")),
            (signed("{}"), Some("repository:a:pull repository:h:1/b:*"), Some("repository:a:pull repository:h:1/b:*")),
            ("opaque".to_owned(), None, None),
            ("a.?.c".to_owned(), None, None),
        ] {
            let found = token(&serde_json::json!({"token": value, "scope": scope}).to_string()).grants();
            let found = found.map(|grants| grants.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
            assert_eq!(found.as_deref(), expected, "{value}");
        }
        let grant = Grant::parse("repository:a:*").unwrap();
        assert!(grant.allows("push") && !Grant::parse("repository:a:pull").unwrap().allows("push"));
    }

    #[tokio::test]
    async fn many_that_ask_at_once_cause_one_fetch() {
        let cache = TokenCache::default();
        let fetches = AtomicUsize::new(0);
        let ask = || {
            cache.get(key(), None, || async {
                fetches.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                Ok::<_, TokenError>(token(r#"{"token":"a","expires_in":300}"#))
            })
        };
        futures::future::try_join_all((0..32).map(|_| ask())).await.unwrap();
        assert_eq!(fetches.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_login_is_exchanged_once_in_its_life_and_once_more_when_it_is_refused() {
        let cache = TokenCache::default();
        let (key_pair, exchanges) = (Credential::new("AKIA".into(), "s".into(), "x"), AtomicUsize::new(0));
        let ask = async |registry: &str, since| {
            let exchange = || async {
                let number = exchanges.fetch_add(1, Ordering::Relaxed);
                let credential = Arc::new(Credential::new("AWS".into(), number.to_string().into(), "x"));
                Ok::<_, TokenError>(Issued { credential, life: Duration::from_hours(12) })
            };
            cache.issued(registry, &key_pair, since, exchange).await.unwrap().password().expose_secret().to_owned()
        };
        let before = Instant::now();
        assert_eq!(
            (ask("a", None).await, ask("a", None).await, ask("b", None).await),
            ("0".into(), "0".into(), "1".into())
        );
        assert_eq!(ask("a", Some(before)).await, "0", "somebody else has renewed it");
        assert_eq!(ask("a", Some(Instant::now())).await, "2");
        let last = cache.last_issued("a", &key_pair).unwrap();
        assert_eq!(last.password().expose_secret(), "2");
    }

    #[tokio::test]
    async fn a_refused_token_and_an_old_one_are_fetched_again() {
        let cache = TokenCache::default();
        let fetch = |text: &'static str| move || async move { Ok::<_, TokenError>(token(text)) };
        let first = cache.get(key(), None, fetch(r#"{"token":"a","expires_in":300}"#)).await.unwrap();
        let second = cache.get(key(), Some(&first), fetch(r#"{"token":"b","expires_in":300}"#)).await.unwrap();
        assert!(!first.is_same(&second));
        let old = Token { renew_at: Instant::now(), ..second.clone() };
        let put = || async { Ok::<_, TokenError>(old) };
        cache.get(key(), Some(&second), put).await.unwrap();
        let third = cache.get(key(), None, fetch(r#"{"token":"c","expires_in":300}"#)).await.unwrap();
        assert!(third.is_same(&token(r#"{"token":"c"}"#)));
    }
}
