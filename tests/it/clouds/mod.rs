//! The registries of clouds, and every way to log in there: real registries of this machine under the clouds' own names, in
//! front of them what the clouds document of their logins. Names in the objects are as users write them; the operator's
//! configuration leads to the stand-ins.

mod aws;
mod azure;
mod guides;
mod logins;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::support::{Place, kubectl};

/// Who signs the tokens of `ServiceAccount`s, and the keys for it as JSON, as clouds are told (`OpenID` Connect Discovery).
fn issuer(place: &Place) -> Result<(String, String)> {
    let raw = |path: &str| kubectl(place.env, &["get", "--raw", path]);
    let discovery: Value = serde_json::from_str(&raw("/.well-known/openid-configuration")?)?;
    Ok((discovery["issuer"].as_str().context("it names its issuer")?.to_owned(), raw("/openid/v1/jwks")?))
}
