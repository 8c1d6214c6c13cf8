//! Azure Container Registry (learn.microsoft.com, "Azure Container Registry authentication").

use anyhow::{Result, ensure};
use imagemirror::api::ImageMirrorStatus;
use serde_json::json;
use testenv::{
    Hosts, Image, RegistryOptions, RegistryServer,
    hosts::{Answer, Asked, HostsBuilder},
    registry::Auth,
    token::{TokenOptions, TokenServer},
};

use crate::support::{Place, message};

const REGISTRY: &str = "myregistry.azurecr.io";
const ENTRA: &str = "entra-access-token-1c7a";

/// A registry that gives its own refresh tokens for [`ENTRA`].
struct Acr {
    hosts: Hosts,
    tokens: TokenServer,
    _registry: RegistryServer,
}

impl Acr {
    async fn start(place: &Place) -> Result<Self> {
        let (env, ca) = (place.env, place.env.ca()?);
        let options = TokenOptions { service: REGISTRY.to_owned(), oauth2: true, ..TokenOptions::default() };
        let log = env.log(&format!("{}-acr-tokens", place.namespace));
        let tokens = TokenServer::start(&ca, &log, options).await?;
        let endpoint = tokens.endpoint();
        let Auth::Token { service, issuer, jwks, .. } = endpoint.auth() else { anyhow::bail!("it has tokens") };
        let realm = format!("https://{REGISTRY}/oauth2/token");
        let options = RegistryOptions {
            name: "acr".into(),
            auth: Auth::Token { realm, service, issuer, jwks },
            ..RegistryOptions::default()
        };
        let registry = RegistryServer::start(env, options).await?;
        let refresh = tokens.refresh_token("push");
        let address = endpoint.url.trim_start_matches("https://").trim_end_matches("/token").to_owned();
        let hosts = HostsBuilder::default()
            .function(REGISTRY, "/oauth2/exchange", move |asked| exchange(asked, &refresh))
            .server_at(REGISTRY, "/oauth2/token", &address, "/token")
            .server(REGISTRY, "/v2/", registry.host())
            .start(&ca)
            .await?;
        Ok(Self { hosts, tokens, _registry: registry })
    }

    fn exchanges(&self) -> usize {
        self.hosts.asked().iter().filter(|line| **line == format!("POST {REGISTRY}/oauth2/exchange")).count()
    }
}

fn exchange(asked: &Asked, refresh: &str) -> Answer {
    let form = asked.form();
    let is = |name: &str, value: &str| form.get(name).is_some_and(|found| found == value);
    if !is("grant_type", "access_token") || !is("service", REGISTRY) {
        return (400, json!({"errors": [{"code": "BAD_REQUEST", "message": "invalid form"}]}).to_string());
    }
    if !is("access_token", ENTRA) {
        let error = json!({"code": "UNAUTHORIZED", "message": "authentication required"});
        return (401, json!({"errors": [error]}).to_string());
    }
    (200, json!({"refresh_token": refresh}).to_string())
}

/// `{"auths": …}` with a password and no user name.
fn without_a_name(password: &str) -> String {
    json!({"auths": {REGISTRY: {"username": "", "password": password}}}).to_string()
}

#[tokio::test]
async fn a_token_without_a_user_name_is_exchanged_at_the_registry() -> Result<()> {
    let place = Place::new("acr-token").await?;
    let acr = Acr::start(&place).await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    place.secret("push", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &without_a_name("wrong"))]).await?;
    let _operator =
        place.operator_from(json!({"registries": acr.hosts.registries(&place.env.ca_path)}), &json!({}), "debug")?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["target"] = json!({"registry": REGISTRY, "repository": "team/{name}", "secretRef": {"name": "push"}});
    place.apply("m", &spec).await?;
    let status = place.until_reason("m", "AuthenticationFailed").await?.status.unwrap_or_default();
    let said = message(&status, "Ready");
    ensure!(said.contains("Secret \"push\"") && said.contains(REGISTRY), "{said}");
    place.secret("push", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &without_a_name(ENTRA))]).await?;
    place.request("m").await?;
    place.until_ready("m").await?;
    ensure!(acr.exchanges() == 2, "{:?}", acr.hosts.asked());
    ensure!(acr.tokens.endpoint().requests()?.iter().all(|asked| asked.user.is_none() || asked.status == 200));
    // The registry's own refresh token needs no exchange.
    let refresh = without_a_name(&acr.tokens.refresh_token("push"));
    place.secret("push", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &refresh)]).await?;
    let moved = Image::single(2, &[1000]);
    place.push(&place.env.source, "agent", "1", &moved).await?;
    place.request("m").await?;
    let digest = moved.root.digest;
    let has_moved = |status: &ImageMirrorStatus| {
        status.images.iter().any(|image| image.digest.as_ref().is_some_and(|found| found.to_string() == digest))
    };
    place.until("m", "the new image", has_moved).await?;
    ensure!(acr.exchanges() == 2, "{:?}", acr.hosts.asked());
    Ok(())
}
