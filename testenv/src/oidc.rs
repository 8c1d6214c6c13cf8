//! Believes tokens of ServiceAccounts as a cloud does: by what the API server publishes of its keys (`OpenID` Connect Discovery),
//! for one audience.

use anyhow::{Context, Result};
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;

/// An API server that issues tokens.
#[derive(Clone)]
pub struct Issuer {
    keys: JwkSet,
    name: String,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
}

impl Issuer {
    /// `/openid/v1/jwks` and `/.well-known/openid-configuration` of the API server.
    pub fn new(jwks: &str, discovery: &str) -> Result<Self> {
        let discovery: serde_json::Value = serde_json::from_str(discovery)?;
        let name = discovery["issuer"].as_str().context("issuer")?.to_owned();
        Ok(Self { keys: serde_json::from_str(jwks)?, name })
    }

    /// What tokens say of who has issued them.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who has shown this token, if it is good for `audience`.
    pub fn subject(&self, token: &str, audience: &str) -> Result<String> {
        let header = jsonwebtoken::decode_header(token)?;
        let key = self.keys.find(header.kid.as_deref().context("kid")?).context("another key")?;
        let mut validation = Validation::new(header.alg);
        validation.algorithms = vec![Algorithm::RS256, Algorithm::ES256];
        validation.algorithms.retain(|known| *known == header.alg);
        validation.set_audience(&[audience]);
        validation.set_issuer(&[&self.name]);
        Ok(jsonwebtoken::decode::<Claims>(token, &DecodingKey::from_jwk(key)?, &validation)?.claims.sub)
    }
}
