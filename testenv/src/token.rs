//! A token server as registries have it (distribution's token specification): Basic authentication in, a signed JWT
//! with the granted scopes out. Distribution verifies the signature with the key set of [`TokenEndpoint::jwks`].
//! Distribution gives 60 s of leeway after a token's end, so a short `expires_in` is seen by clients alone.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

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
    /// The name in the credentials, right or wrong; none if there were none.
    pub user: Option<String>,
    pub service: Option<String>,
    pub scopes: Vec<String>,
    pub status: u16,
}

impl TokenEndpoint {
    #[must_use]
    pub fn user(&self, name: &str) -> Option<&User> {
        self.users.iter().find(|user| user.name == name)
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
    /// What a request without credentials is granted.
    pub anonymous: Vec<String>,
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
            anonymous: Vec::new(),
        }
    }
}

/// A running token server; dropping it stops it.
pub struct TokenServer {
    endpoint: TokenEndpoint,
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
        let key = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes())?;
        let issuer = Arc::new(Issuer { options, key, log: Mutex::new(file) });
        let acceptor = TlsAcceptor::from(ca.server()?.server_config()?);
        let task = tokio::spawn(serve(listener, acceptor, issuer));
        Ok(Self { endpoint, task })
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
            let service = hyper::service::service_fn(|request| {
                let answer = issuer.answer(&request);
                async move { answer }
            });
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

struct Issuer {
    options: TokenOptions,
    key: EncodingKey,
    log: Mutex<std::fs::File>,
}

impl Issuer {
    fn answer(&self, request: &Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let credentials = request.headers().get(header::AUTHORIZATION).map(|value| basic(value.as_bytes()));
        let query = |name: &str| -> Vec<String> {
            let pairs = url_pairs(request.uri().query().unwrap_or_default());
            pairs.into_iter().filter(|(key, _)| key == name).map(|(_, value)| value).collect()
        };
        // One parameter may hold several scopes, separated by spaces.
        let scopes: Vec<String> = query("scope").iter().flat_map(|scope| scope.split(' ')).map(str::to_owned).collect();
        let service = query("service").pop();

        let user = credentials.as_ref().and_then(|credentials| {
            let (name, password) = credentials.as_ref()?;
            self.options.users.iter().find(|user| user.name == *name && user.password == *password)
        });
        let grants = match (&credentials, user) {
            (None, _) => Some(&self.options.anonymous),
            (Some(_), Some(user)) => Some(&user.grants),
            (Some(_), None) => None,
        };
        let (status, body) = match grants {
            _ if request.uri().path() != "/token" => (StatusCode::NOT_FOUND, json!({})),
            _ if request.method() != Method::GET => (StatusCode::METHOD_NOT_ALLOWED, json!({})),
            Some(grants) => (StatusCode::OK, self.issue(user.map_or("", |user| &user.name), &scopes, grants)?),
            None => {
                let error = json!({ "code": "UNAUTHORIZED", "message": "incorrect username or password" });
                (StatusCode::UNAUTHORIZED, json!({ "errors": [error] }))
            }
        };
        let name = credentials.map(|credentials| credentials.map_or_else(String::new, |(name, _)| name));
        self.note(&TokenRequest { user: name, service, scopes, status: status.as_u16() })?;
        let response = Response::builder().status(status).header(header::CONTENT_TYPE, "application/json");
        Ok(response.body(Full::from(body.to_string()))?)
    }

    fn issue(&self, subject: &str, scopes: &[String], grants: &[String]) -> Result<Value> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let access: Vec<Value> = scopes.iter().filter_map(|scope| access(scope, grants)).collect();
        let claims = json!({
            "iss": self.options.issuer,
            "sub": subject,
            "aud": self.options.service,
            "iat": now,
            "nbf": now,
            "exp": now + self.options.expires_in,
            "jti": format!("{:032x}", fastrand::u128(..)),
            "access": access,
        });
        let header = Header { kid: Some(KEY_ID.to_owned()), ..Header::new(Algorithm::ES256) };
        let token = jsonwebtoken::encode(&header, &claims, &self.key)?;
        Ok(json!({ "token": token, "access_token": token, "expires_in": self.options.expires_in }))
    }

    fn note(&self, request: &TokenRequest) -> Result<()> {
        let line = format!("{}\n", serde_json::to_string(request)?);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(log.write_all(line.as_bytes())?)
    }
}

/// The entry of the token's `access` for `repository:NAME:ACTIONS`; none if nothing of it is granted.
fn access(scope: &str, grants: &[String]) -> Option<Value> {
    let (kind, rest) = scope.split_once(':')?;
    let (name, actions) = rest.rsplit_once(':')?;
    let granted: Vec<&str> = actions
        .split(',')
        .filter(|action| kind == "repository" && grants.iter().any(|grant| grant == action))
        .collect();
    (!granted.is_empty()).then(|| json!({ "type": kind, "name": name, "actions": granted }))
}

fn basic(value: &[u8]) -> Option<(String, String)> {
    let encoded = std::str::from_utf8(value).ok()?.strip_prefix("Basic ")?;
    let text = String::from_utf8(BASE64_STANDARD.decode(encoded).ok()?).ok()?;
    text.split_once(':').map(|(name, password)| (name.to_owned(), password.to_owned()))
}

pub(crate) fn url_pairs(query: &str) -> Vec<(String, String)> {
    let pairs = reqwest::Url::parse(&format!("http://localhost/?{query}")).ok();
    pairs.map(|url| url.query_pairs().into_owned().collect()).unwrap_or_default()
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
