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
use tokio::sync::RwLock;

use super::{
    Credential, Issued,
    slots::{Slots, Term},
};
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
    term: Term,
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
        Ok(Self { value, term: Term::new(now, life), refresh, scope: answer.scope })
    }

    /// Whether it is not time to renew it.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.term.is_fresh()
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

/// What to log in with next: the identity token of a credential, or the one that a server has given in its place.
pub type NextLogin = Arc<RwLock<Next>>;

/// An identity token, and what is known of it.
pub struct Next {
    /// What the token server is shown.
    pub credential: Arc<Credential>,
    /// Whether the server has taken it and given no other one in its place: then it is shown as often as one likes. Until
    /// that is known one request at a time shows it, as a server may take each of them once.
    pub is_kept: bool,
    /// Whether a server has given it, in place of the one that was written: there is no other way to have it.
    is_given: bool,
}

impl Next {
    /// A server was shown the credential, and has given this one in its place, or none.
    pub fn answered(&mut self, given: Option<&SecretString>) {
        let other = given.filter(|given| !self.credential.as_identity_token().is_some_and(|own| is_same(own, given)));
        self.is_kept = other.is_none();
        if let Some(other) = other {
            self.credential = Arc::new(Credential::identity_token(other.clone(), self.credential.origin()));
            self.is_given = true;
        }
    }
}

/// The logins and tokens of the process. `E` is why there is none.
pub struct TokenCache<E> {
    tokens: Slots<TokenKey, Token, E>,
    issued: Slots<LoginKey, Login, E>,
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
}

impl<E: Clone> TokenCache<E> {
    /// `may_pass` is whether asking again soon may succeed after a failure.
    #[must_use]
    pub fn new(may_pass: fn(&E) -> bool) -> Self {
        Self { tokens: Slots::new(may_pass), issued: Slots::new(may_pass), next: Mutex::default() }
    }

    /// The token for `key`, fetched if there is none that is fresh. Whoever asks meanwhile waits for the same fetch.
    ///
    /// `refused` is a token that the registry has just refused: it is not returned again. A failure that will not pass is
    /// the answer of all who ask, if it is from after `believed`.
    pub async fn get<F, Fut>(
        &self,
        key: TokenKey,
        (refused, believed): (Option<&Token>, Instant),
        fetch: F,
    ) -> Result<Token, E>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Token, E>>,
    {
        let accept = |token: &Token| refused.is_none_or(|refused| !is_same(&refused.value, &token.value));
        let fetch = || async {
            let token = fetch().await?;
            let term = token.term;
            Ok((token, term))
        };
        self.tokens.get(key, believed, accept, fetch).await
    }

    /// The login that a credential is exchanged for at this registry, by one exchange at a time, and again at 80 % of its
    /// life. One from before `since` is not returned again: it has just been refused. A refusal to exchange is the answer
    /// of all who show what was read before it.
    pub async fn issued<F, Fut>(
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
            Ok((Login { credential, issued_at }, Term::new(issued_at, life)))
        };
        let is_new = |login: &Login| since.is_none_or(|since| login.issued_at >= since);
        let believed = since.unwrap_or_else(|| credential.read_at());
        let key = (registry.to_owned(), credential.fingerprint().clone());
        Ok(self.issued.get(key, believed, is_new, fetch).await?.credential)
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
        let key = (registry.to_owned(), credential.fingerprint().clone());
        let mut logins = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if logins.len() >= Self::MAX_LOGINS && !logins.contains_key(&key) {
            let is_used = |login: &NextLogin| Arc::strong_count(login) > 1;
            logins.retain(|_, login| is_used(login) || login.try_read().is_ok_and(|next| next.is_given));
            if logins.len() >= Self::MAX_LOGINS {
                logins.retain(|_, login| is_used(login));
            }
        }
        let new = || {
            let next = Next { credential: Arc::clone(credential), is_kept: false, is_given: false };
            Arc::new(RwLock::new(next))
        };
        Arc::clone(logins.entry(key).or_insert_with(new))
    }

    const MAX_LOGINS: usize = 4096;
}

fn is_same(one: &SecretString, other: &SecretString) -> bool {
    use secrecy::ExposeSecret;
    one.expose_secret() == other.expose_secret()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use secrecy::ExposeSecret as _;

    use super::*;

    fn token(text: &str) -> Token {
        Token::from_answer(text.as_bytes(), Instant::now()).unwrap()
    }

    fn same(one: &Token, other: &Token) -> bool {
        is_same(&one.value, &other.value)
    }

    fn cache() -> TokenCache<TokenError> {
        TokenCache::new(|_| false)
    }

    fn key() -> TokenKey {
        TokenKey { registry: "r".into(), credential: None, scope: Scope::Pull("a".parse().unwrap()) }
    }

    #[test]
    fn answers_in_both_forms_are_read_and_others_are_refused() {
        assert!(same(&token(r#"{"token":"a","expires_in":300}"#), &token(r#"{"access_token":"a"}"#)));
        assert!(same(&token(r#"{"token":"","access_token":"b"}"#), &token(r#"{"token":"b"}"#)));
        for bad in ["", "{}", "<html>", r#"{"token":""}"#, r#"{"token":7}"#] {
            assert!(Token::from_answer(bad.as_bytes(), Instant::now()).is_err(), "{bad}");
        }
    }

    #[test]
    fn four_fifths_of_a_life_are_used_and_one_that_is_not_said_is_a_minute() {
        for (said, seconds) in [("300", 240.0), ("null", 48.0), ("0", 0.8), ("99999999", 69_120.0)] {
            let (now, answer) = (Instant::now(), format!(r#"{{"token":"a","expires_in":{said}}}"#));
            let token = Token::from_answer(answer.as_bytes(), now).unwrap();
            assert_eq!(token.term.renewed_after(now), Duration::from_secs_f64(seconds), "{said}");
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
        let cache = cache();
        let fetches = AtomicUsize::new(0);
        let ask = || {
            cache.get(key(), (None, Instant::now()), || async {
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
        let cache = cache();
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
        let cache = cache();
        let fetch = |text: &'static str| move || async move { Ok::<_, TokenError>(token(text)) };
        let ask = async |refused, text| cache.get(key(), (refused, Instant::now()), fetch(text)).await.unwrap();
        let first = ask(None, r#"{"token":"a","expires_in":300}"#).await;
        let second = ask(Some(&first), r#"{"token":"b","expires_in":300}"#).await;
        assert!(!same(&first, &second));
        let old = Token { term: Term::new(Instant::now(), Duration::ZERO), ..second.clone() };
        let put = || async { Ok::<_, TokenError>(old) };
        cache.get(key(), (Some(&second), Instant::now()), put).await.unwrap();
        let third = ask(None, r#"{"token":"c","expires_in":300}"#).await;
        assert!(same(&third, &token(r#"{"token":"c"}"#)));
    }

    #[test]
    fn an_identity_token_is_shown_as_often_as_one_likes_once_it_is_known_to_be_kept() {
        let cache = cache();
        let written = Arc::new(Credential::identity_token("a".to_owned().into(), "x"));
        let next = cache.next_login("r", &written);
        let mut next = next.try_write().unwrap();
        assert!(!next.is_kept);
        for (given, shown, is_kept) in [
            (None, "a", true),
            (Some("a"), "a", true),
            (Some("b"), "b", false),
            (Some("c"), "c", false),
            (None, "c", true),
        ] {
            next.answered(given.map(|given| given.to_owned().into()).as_ref());
            let token = next.credential.as_identity_token().map(|token| token.expose_secret().to_owned());
            assert_eq!((token.as_deref(), next.is_kept), (Some(shown), is_kept), "{given:?}");
        }
    }

    /// One that was written can be read again.
    #[test]
    fn of_too_many_identity_tokens_those_that_a_server_has_given_stay() {
        let cache = cache();
        let login = |number: usize| {
            cache.next_login("r", &Arc::new(Credential::identity_token(number.to_string().into(), "x")))
        };
        login(0).try_write().unwrap().answered(Some(&"given".to_owned().into()));
        for number in 1..=TokenCache::<TokenError>::MAX_LOGINS {
            drop(login(number));
        }
        assert!(cache.next.lock().unwrap().len() < 10);
        assert_eq!(login(0).try_read().unwrap().credential.password().expose_secret(), "given");
    }
}
