//! Azure Container Registry with a token in place of a password, and no user name.
//!
//! A refresh token of the registry logs in as it is; any other token is one of Entra, which the registry's own
//! `/oauth2/exchange` takes for a refresh token (learn.microsoft.com, "Azure Container Registry authentication"; the
//! protocol is in github.com/Azure/acr, docs/AAD-OAuth.md).

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, header::CONTENT_TYPE};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::{
    auth::{Credential, Exchange, ExchangeError, Http, Issued},
    oci::Host,
};

/// How long the registry's refresh tokens are good for, where they do not say it.
const LIFE: Duration = Duration::from_hours(3);

/// A token of Entra, or of the registry.
pub struct AcrToken {
    host: Host,
    token: SecretString,
    tenant: Option<String>,
    origin: String,
}

impl AcrToken {
    /// `origin` is said in messages.
    #[must_use]
    pub fn new(host: Host, token: SecretString, origin: &str) -> Self {
        Self { host, token, tenant: None, origin: origin.to_owned() }
    }

    /// The same where the tenant of Entra is known that has issued it.
    #[must_use]
    pub fn of_tenant(self, tenant: Option<String>) -> Self {
        Self { tenant, ..self }
    }

    /// Asks the registry for a refresh token.
    async fn ask(&self, http: &dyn Http) -> Result<Issued, ExchangeError> {
        if Claims::of(&self.token).is_some_and(|claims| claims.grant_type.as_deref() == Some("refresh_token")) {
            return Ok(self.issued(self.token.clone()));
        }
        let host = self.host.as_str();
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "access_token")
            .append_pair("service", host)
            .extend_pairs(self.tenant.as_ref().map(|tenant| ("tenant", tenant)))
            .append_pair("access_token", self.token.expose_secret())
            .finish();
        let request = http::Request::builder()
            .method(Method::POST)
            .uri(format!("https://{host}/oauth2/exchange"))
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Bytes::from(form))
            .map_err(|error| ExchangeError::Malformed { host: host.to_owned(), what: error.to_string() })?;
        let answer = http.send(request).await.map_err(ExchangeError::Unanswered)?;
        if !answer.status().is_success() {
            let refusal: Refusal = serde_json::from_slice(answer.body()).unwrap_or_default();
            let first = refusal.errors.into_iter().next().unwrap_or_default();
            return Err(ExchangeError::refused(host, answer.status(), first.code, first.message, &[&self.token]));
        }
        let answer: Answer = serde_json::from_slice(answer.body()).map_err(|_| ExchangeError::Malformed {
            host: host.to_owned(),
            what: "its answer holds no refresh token".to_owned(),
        })?;
        Ok(self.issued(answer.refresh_token))
    }

    fn issued(&self, refresh: SecretString) -> Issued {
        let life = Claims::of(&refresh).and_then(|claims| claims.life()).unwrap_or(LIFE);
        Issued { credential: Arc::new(Credential::identity_token(refresh, &self.origin)), life }
    }
}

impl Exchange for AcrToken {
    fn exchange(&self, http: Arc<dyn Http>) -> BoxFuture<'_, Result<Issued, ExchangeError>> {
        Box::pin(async move { self.ask(&*http).await })
    }
}

impl std::fmt::Debug for AcrToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AcrToken({} of {}, [redacted])", self.host, self.origin)
    }
}

#[derive(Deserialize)]
struct Answer {
    refresh_token: SecretString,
}

#[derive(Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    errors: Vec<Wrong>,
}

#[derive(Default, Deserialize)]
struct Wrong {
    code: Option<String>,
    message: Option<String>,
}

/// What a JSON Web Token says of itself (RFC 7519, section 4.1). Nothing is believed of it that matters.
#[derive(Deserialize)]
pub(super) struct Claims {
    iss: Option<String>,
    grant_type: Option<String>,
    iat: Option<u64>,
    exp: Option<u64>,
}

impl Claims {
    fn of(token: &SecretString) -> Option<Self> {
        let payload = token.expose_secret().split('.').nth(1)?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?).ok()
    }

    /// Who has made a token, for messages; nothing if it does not say.
    pub(super) fn issuer_of(token: &SecretString) -> String {
        Self::of(token).and_then(|claims| claims.iss).unwrap_or_default()
    }

    /// As long as it was made to last: our clock may be another one than theirs.
    fn life(&self) -> Option<Duration> {
        let seconds = self.exp?.checked_sub(self.iat?)?;
        Some(Duration::from_secs(seconds.clamp(1, 86_400)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(claims: &str) -> SecretString {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims)).into()
    }

    #[test]
    fn what_a_token_is_and_how_long_it_lasts_is_read_from_it() {
        let refresh = Claims::of(&token(r#"{"grant_type":"refresh_token","iat":1000,"exp":11800}"#)).unwrap();
        assert_eq!(refresh.grant_type.as_deref(), Some("refresh_token"));
        assert_eq!(refresh.life(), Some(Duration::from_hours(3)));
        assert!(Claims::of(&token(r#"{"aud":"https://management.azure.com/"}"#)).unwrap().grant_type.is_none());
        for bad in ["", "opaque", "a.?.c", "a.e30"] {
            assert!(Claims::of(&bad.to_owned().into()).is_none_or(|claims| claims.life().is_none()), "{bad}");
        }
    }
}
