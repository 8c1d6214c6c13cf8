//! A token server as registries have it (distribution's token specification): Basic authentication or an OAuth form
//! in, a signed JWT with the granted scopes out. Distribution verifies the signature with the key set of
//! [`TokenEndpoint::jwks`]. It gives 60 s of leeway after a token's end, so a short `expires_in` is seen by clients alone;
//! `lives` is what the registry sees.
//!
//! To make it fail, put a [`Proxy`](crate::Proxy) in front: [`Proxy::to_tokens`](crate::Proxy::to_tokens), and
//! [`TokenEndpoint::at`] for the registry.

mod issuer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hyper_util::rt::TokioIo;
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use self::issuer::Issuer;
pub(crate) use self::issuer::url_pairs;
use crate::certs::Ca;
use crate::registry::Auth;

const KEY_ID: &str = "testenv";

/// Who may log in, and what the tokens say then.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct User {
    pub name: String,
    pub password: String,
    /// Of `pull`, `push`, `delete`, on every repository.
    pub grants: Vec<String>,
}

impl User {
    #[must_use]
    pub fn new(name: &str, password: &str, grants: &[&str]) -> Self {
        let grants = grants.iter().map(|grant| (*grant).to_owned()).collect();
        Self { name: name.to_owned(), password: password.to_owned(), grants }
    }
}

/// What others know of a token server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenEndpoint {
    /// The realm: `https://127.0.0.1:PORT/token`, or another name of this machine.
    pub url: String,
    pub service: String,
    pub issuer: String,
    pub jwks: String,
    pub users: Vec<User>,
    /// One JSON object a line, a [`TokenRequest`].
    pub log: PathBuf,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRequest {
    pub method: String,
    /// `password` or `refresh_token`, of a POST.
    pub grant_type: Option<String>,
    /// The name in the credentials, right or wrong, or whom the refresh token belongs to; none if there were none.
    pub user: Option<String>,
    pub service: Option<String>,
    /// All that were asked for, granted or not.
    pub scopes: Vec<String>,
    /// Whether a refresh token was asked for.
    pub offline: bool,
    pub status: u16,
}

impl TokenEndpoint {
    #[must_use]
    pub fn user(&self, name: &str) -> Option<&User> {
        self.users.iter().find(|user| user.name == name)
    }

    /// The same server at another address (`https://127.0.0.1:PORT`), such as that of a proxy in front of it.
    #[must_use]
    pub fn at(&self, base: &str) -> Self {
        Self { url: format!("{base}/token"), ..self.clone() }
    }

    /// What makes a registry send its clients here.
    #[must_use]
    pub fn auth(&self) -> Auth {
        Auth::Token {
            realm: self.url.clone(),
            service: self.service.clone(),
            issuer: self.issuer.clone(),
            jwks: self.jwks.clone(),
        }
    }

    /// All requests so far, oldest first.
    pub fn requests(&self) -> Result<Vec<TokenRequest>> {
        let text = std::fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }
}

/// What the server does.
#[derive(Clone, Debug)]
pub struct TokenOptions {
    /// The realm's host: a name of this machine that is in the certificate.
    pub host: String,
    pub service: String,
    pub issuer: String,
    pub users: Vec<User>,
    /// Seconds.
    pub expires_in: u64,
    /// After how many seconds, rounded up, distribution refuses a token, where that is not a minute after `expires_in`.
    pub lives: Option<u64>,
    /// What a request without credentials is granted.
    pub anonymous: Vec<String>,
    /// Nothing is granted on other repositories than these, if they are given.
    pub repositories: Option<Vec<String>>,
    /// Read only the first `scope` parameter.
    pub first_scope_only: bool,
    /// Answer POST (OAuth) too, else 404; give refresh tokens, and take them as the password of the user `<token>`.
    pub oauth2: bool,
    /// A refresh token is good for one login, whose answer holds the next one.
    pub rotates: bool,
}

impl Default for TokenOptions {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            service: "testenv".to_owned(),
            issuer: "testenv-tokens".to_owned(),
            users: vec![
                User::new("push", "push-password-4711", &["pull", "push", "delete"]),
                User::new("pull", "pull-password-0815", &["pull"]),
                User::new("nobody", "nobody-password", &[]),
            ],
            expires_in: 300,
            lives: None,
            anonymous: Vec::new(),
            repositories: None,
            first_scope_only: false,
            oauth2: false,
            rotates: false,
        }
    }
}

/// A running token server; dropping it stops it.
pub struct TokenServer {
    endpoint: TokenEndpoint,
    issuer: Arc<Issuer>,
    task: JoinHandle<()>,
}

impl TokenServer {
    pub async fn start(ca: &Ca, log: &Path, options: TokenOptions) -> Result<Self> {
        let key = KeyPair::generate()?;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let endpoint = TokenEndpoint {
            url: format!("https://{}:{}/token", options.host, listener.local_addr()?.port()),
            service: options.service.clone(),
            issuer: options.issuer.clone(),
            jwks: key_set(&key),
            users: options.users.clone(),
            log: log.to_owned(),
        };
        let file = std::fs::File::create(log).with_context(|| format!("create {}", log.display()))?;
        let issuer = Arc::new(Issuer::new(options, &key.serialize_pem(), file)?);
        let acceptor = TlsAcceptor::from(ca.server()?.server_config()?);
        let task = tokio::spawn(serve(listener, acceptor, Arc::clone(&issuer)));
        Ok(Self { endpoint, issuer, task })
    }

    /// A new refresh token, as `docker login` would have stored it (`identitytoken` in a pull secret).
    #[must_use]
    pub fn refresh_token(&self, user: &str) -> String {
        self.issuer.refresh_token(user, None)
    }

    /// The same, of which it says itself that it is good for so many seconds.
    #[must_use]
    pub fn refresh_token_for(&self, user: &str, seconds: u64) -> String {
        self.issuer.refresh_token(user, Some(seconds))
    }

    /// Takes this password or refresh token no more.
    pub fn revoke(&self, secret: &str) {
        self.issuer.revoke(secret);
    }

    #[must_use]
    pub fn endpoint(&self) -> &TokenEndpoint {
        &self.endpoint
    }
}

impl Drop for TokenServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, issuer: Arc<Issuer>) {
    // Dropped with this task, and its connections with it.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (acceptor, issuer) = (acceptor.clone(), issuer.clone());
        connections.spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = hyper::service::service_fn(|request| issuer.answer(request));
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// The public key as a JSON Web Key Set (RFC 7517).
fn key_set(key: &KeyPair) -> String {
    // An uncompressed point: 4, then x and y.
    let (x, y) = key.public_key_raw()[1..].split_at(32);
    let encode = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
    let key = json!({
        "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": KEY_ID, "x": encode(x), "y": encode(y),
    });
    json!({ "keys": [key] }).to_string()
}
