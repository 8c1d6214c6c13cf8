//! What the token server answers: who asks, by which of the two methods, and what that one may have.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header, request};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use super::{KEY_ID, TokenOptions, TokenRequest};

const FORM_LIMIT: usize = 64 << 10;
/// The name under which a refresh token is the password.
const TOKEN_USER: &str = "<token>";
/// For how many seconds after its end distribution takes a token.
const LEEWAY: u64 = 60;

pub(super) struct Issuer {
    options: TokenOptions,
    key: EncodingKey,
    log: Mutex<File>,
    /// Passwords and refresh tokens that are taken no more.
    revoked: Mutex<HashSet<String>>,
    /// The users that refresh tokens belong to.
    refresh_tokens: Mutex<HashMap<String, String>>,
}

/// What somebody asks for, by either method.
struct Asked {
    login: Login,
    grant_type: Option<String>,
    service: Option<String>,
    scopes: Vec<String>,
    offline: bool,
    /// What the OAuth form lacks, as its error code.
    error: Option<&'static str>,
}

enum Login {
    Anonymous,
    Password(String, String),
    Refresh(String),
}

impl Issuer {
    pub(super) fn new(options: TokenOptions, key_pem: &str, log: File) -> Result<Self> {
        let key = EncodingKey::from_ec_pem(key_pem.as_bytes())?;
        Ok(Self { options, key, log: Mutex::new(log), revoked: Mutex::default(), refresh_tokens: Mutex::default() })
    }

    pub(super) fn refresh_token(&self, user: &str, life: Option<u64>) -> String {
        // As Azure's are: a token that says what it is, and perhaps how long it is good for.
        let mut claims = json!({"grant_type": "refresh_token", "jti": format!("{:032x}", fastrand::u128(..))});
        if let Some(life) = life {
            (claims["iat"], claims["exp"]) = (json!(1_000_000), json!(1_000_000 + life));
        }
        let token = format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()));
        let mut tokens = self.refresh_tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.insert(token.clone(), user.to_owned());
        token
    }

    pub(super) fn revoke(&self, secret: &str) {
        self.revoked().insert(secret.to_owned());
    }

    fn revoked(&self) -> MutexGuard<'_, HashSet<String>> {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let (parts, body) = request.into_parts();
        let asked = if parts.method == Method::POST {
            let form = Limited::new(body, FORM_LIMIT).collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes();
            self.form(&url_pairs(&String::from_utf8_lossy(&form)))
        } else {
            self.query(&parts)
        };
        let user = self.user(&asked.login);
        let (status, body) = self.decide(&parts, &asked, user.as_deref())?;
        let name = match asked.login {
            Login::Anonymous => None,
            Login::Password(name, _) => Some(name),
            Login::Refresh(_) => Some(user.unwrap_or_else(|| TOKEN_USER.to_owned())),
        };
        self.note(&TokenRequest {
            method: parts.method.to_string(),
            grant_type: asked.grant_type,
            user: name,
            service: asked.service,
            scopes: asked.scopes,
            offline: asked.offline,
            status: status.as_u16(),
        })?;
        let response = Response::builder().status(status).header(header::CONTENT_TYPE, "application/json");
        Ok(response.body(Full::from(body.to_string()))?)
    }

    /// The GET that every token server answers.
    fn query(&self, parts: &request::Parts) -> Asked {
        let pairs = url_pairs(parts.uri.query().unwrap_or_default());
        let login = match parts.headers.get(header::AUTHORIZATION).map(|value| basic(value.as_bytes())) {
            None => Login::Anonymous,
            Some(Some((name, token))) if self.options.oauth2 && name == TOKEN_USER => Login::Refresh(token),
            Some(credentials) => {
                let (name, password) = credentials.unwrap_or_default();
                Login::Password(name, password)
            }
        };
        Asked {
            login,
            grant_type: None,
            service: first(&pairs, "service"),
            scopes: self.scopes(&pairs),
            offline: first(&pairs, "offline_token").as_deref() == Some("true"),
            error: None,
        }
    }

    /// The POST of "OAuth Token Authentication".
    fn form(&self, pairs: &[(String, String)]) -> Asked {
        let field = |name| first(pairs, name);
        let grant_type = field("grant_type");
        let mut error = (field("client_id").is_none() || field("service").is_none()).then_some("invalid_request");
        let login = match grant_type.as_deref() {
            Some("password") => {
                Login::Password(field("username").unwrap_or_default(), field("password").unwrap_or_default())
            }
            Some("refresh_token") => Login::Refresh(field("refresh_token").unwrap_or_default()),
            _ => {
                error = Some("unsupported_grant_type");
                Login::Anonymous
            }
        };
        let offline = field("access_type").as_deref() == Some("offline");
        Asked { login, grant_type, service: field("service"), scopes: self.scopes(pairs), offline, error }
    }

    /// One parameter may hold several scopes, separated by spaces.
    fn scopes(&self, pairs: &[(String, String)]) -> Vec<String> {
        let parameters = pairs.iter().filter(|(name, _)| name == "scope").map(|(_, value)| value);
        let count = if self.options.first_scope_only { 1 } else { usize::MAX };
        parameters.take(count).flat_map(|scopes| scopes.split(' ')).map(str::to_owned).collect()
    }

    /// Who it is; the anonymous user and one with wrong credentials are nobody.
    fn user(&self, login: &Login) -> Option<String> {
        match login {
            Login::Password(_, secret) | Login::Refresh(secret) if self.revoked().contains(secret) => None,
            Login::Anonymous => None,
            Login::Password(name, password) => {
                let is_it = self.options.users.iter().any(|user| user.name == *name && user.password == *password);
                is_it.then(|| name.clone())
            }
            Login::Refresh(token) => {
                let mut tokens = self.refresh_tokens.lock().unwrap_or_else(PoisonError::into_inner);
                if self.options.rotates { tokens.remove(token) } else { tokens.get(token).cloned() }
            }
        }
    }

    fn decide(&self, parts: &request::Parts, asked: &Asked, user: Option<&str>) -> Result<(StatusCode, Value)> {
        let is_post = parts.method == Method::POST;
        if parts.uri.path() != "/token" || (is_post && !self.options.oauth2) {
            return Ok((StatusCode::NOT_FOUND, json!({})));
        }
        if !is_post && parts.method != Method::GET {
            return Ok((StatusCode::METHOD_NOT_ALLOWED, json!({})));
        }
        if let Some(error) = asked.error {
            return Ok((StatusCode::BAD_REQUEST, json!({ "error": error })));
        }
        let known = self.options.users.iter().find(|known| Some(known.name.as_str()) == user);
        let grants = match (&asked.login, known) {
            (Login::Anonymous, _) => &self.options.anonymous,
            (_, Some(user)) => &user.grants,
            (_, None) => {
                let error = json!({ "code": "UNAUTHORIZED", "message": "incorrect username or password" });
                return Ok((StatusCode::UNAUTHORIZED, json!({ "errors": [error] })));
            }
        };
        let user = user.unwrap_or_default();
        let granted: Vec<_> = asked.scopes.iter().filter_map(|scope| self.granted(scope, grants)).collect();
        let token = self.sign(user, &granted)?;
        let mut answer = json!({ "access_token": token, "expires_in": self.options.expires_in });
        if is_post {
            let scopes = granted.iter().map(|(name, actions)| format!("repository:{name}:{}", actions.join(",")));
            answer["scope"] = scopes.collect::<Vec<_>>().join(" ").into();
        } else {
            answer["token"] = token.into();
        }
        let is_next = self.options.rotates && matches!(asked.login, Login::Refresh(_));
        if is_next || (self.options.oauth2 && asked.offline && !user.is_empty()) {
            answer["refresh_token"] = self.refresh_token(user, None).into();
        }
        Ok((StatusCode::OK, answer))
    }

    /// Repository and actions of `repository:NAME:ACTIONS` as far as they are granted; none if nothing is.
    fn granted<'a>(&self, scope: &'a str, grants: &[String]) -> Option<(&'a str, Vec<&'a str>)> {
        let (name, actions) = scope.strip_prefix("repository:")?.rsplit_once(':')?;
        if self
            .options
            .repositories
            .as_ref()
            .is_some_and(|repositories| !repositories.iter().any(|known| known == name))
        {
            return None;
        }
        let granted: Vec<&str> =
            actions.split(',').filter(|action| grants.iter().any(|grant| grant == action)).collect();
        (!granted.is_empty()).then_some((name, granted))
    }

    fn sign(&self, subject: &str, granted: &[(&str, Vec<&str>)]) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let end = match self.options.lives {
            // A second that has begun counts whole: no token ends before its time.
            Some(lives) => now.as_secs() + 1 + lives - LEEWAY,
            None => now.as_secs() + self.options.expires_in,
        };
        let now = now.as_secs();
        let access =
            granted.iter().map(|(name, actions)| json!({ "type": "repository", "name": name, "actions": actions }));
        let claims = json!({
            "iss": self.options.issuer,
            "sub": subject,
            "aud": self.options.service,
            "iat": now,
            "nbf": now,
            "exp": end,
            "jti": format!("{:032x}", fastrand::u128(..)),
            "access": access.collect::<Vec<_>>(),
        });
        let header = Header { kid: Some(KEY_ID.to_owned()), ..Header::new(Algorithm::ES256) };
        Ok(jsonwebtoken::encode(&header, &claims, &self.key)?)
    }

    fn note(&self, request: &TokenRequest) -> Result<()> {
        let line = format!("{}\n", serde_json::to_string(request)?);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(log.write_all(line.as_bytes())?)
    }
}

fn first(pairs: &[(String, String)], name: &str) -> Option<String> {
    pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
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
