//! Azure Container Registry (learn.microsoft.com, "Azure Container Registry authentication").

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Result, bail, ensure};
use futures::future::try_join_all;
use imagemirror::api::ImageMirrorStatus;
use serde_json::json;
use testenv::{
    Hosts, Image, RegistryOptions, RegistryServer,
    hosts::{Answer, Asked, HostsBuilder},
    oidc::Issuer,
    registry::Auth,
    token::{TokenOptions, TokenServer},
};

use super::{TALKATIVE, images_come_over_until, nothing_is_told, service_account, spec, subject};
use crate::{
    audit,
    support::{Place, message},
};

const REGISTRY: &str = "myregistry.azurecr.io";
const ENTRA: &str = "entra-access-token-1c7a";

/// `{"auths": …}` with a password and no user name.
pub(super) fn without_a_name(registry: &str, password: &str) -> String {
    json!({"auths": {registry: {"username": "", "password": password}}}).to_string()
}

#[tokio::test]
async fn a_token_without_a_user_name_is_exchanged_at_the_registry() -> Result<()> {
    let place = Place::new("acr-token").await?;
    let cloud = Cloud::start(&place).await?;
    cloud.azure.give_out(ENTRA);
    let exchange = format!("POST {REGISTRY}/oauth2/exchange");
    let exchanges = || cloud.hosts.asked().iter().filter(|line| **line == exchange).count();
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    place
        .secret("push", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &without_a_name(REGISTRY, "wrong"))])
        .await?;
    let _operator = place.operator_from(cloud.config(&place), &json!({}), "debug")?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["target"] = json!({"registry": REGISTRY, "repository": "team/{name}", "secretRef": {"name": "push"}});
    place.apply("m", &spec).await?;
    let status = place.until_reason("m", "AuthenticationFailed").await?.status.unwrap_or_default();
    let said = message(&status, "Ready");
    ensure!(said.contains("Secret \"push\"") && said.contains(REGISTRY), "{said}");
    place
        .secret("push", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &without_a_name(REGISTRY, ENTRA))])
        .await?;
    place.request("m").await?;
    place.until_ready("m").await?;
    ensure!(exchanges() == 2, "{:?}", cloud.hosts.asked());
    ensure!(
        cloud.azure.tokens().endpoint().requests()?.iter().all(|asked| asked.user.is_none() || asked.status == 200)
    );
    // The registry's own refresh token needs no exchange.
    let refresh = without_a_name(REGISTRY, &cloud.azure.tokens().refresh_token("push"));
    place.secret("push", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &refresh)]).await?;
    let moved = Image::single(2, &[1000]);
    place.push(&place.env.source, "agent", "1", &moved).await?;
    place.request("m").await?;
    let digest = moved.root.digest;
    let has_moved = |status: &ImageMirrorStatus| {
        status.images.iter().any(|image| image.digest.as_ref().is_some_and(|found| found.to_string() == digest))
    };
    place.until("m", "the new image", has_moved).await?;
    ensure!(exchanges() == 2, "{:?}", cloud.hosts.asked());
    Ok(())
}

const ENTRA_HOST: &str = "login.microsoftonline.com";
const METADATA: &str = "169.254.169.254";
pub(super) const TENANT: &str = "72f988bf-86f1-41af-91ab-2d7cd011db47";
const AUDIENCE: &str = "api://AzureADTokenExchange";

/// Entra, the metadata service and registries.
pub(super) struct Azure {
    issuer: Issuer,
    registries: Vec<Registry>,
    state: Mutex<State>,
}

struct Registry {
    host: &'static str,
    tokens: TokenServer,
    server: RegistryServer,
}

#[derive(Default)]
struct State {
    /// Seconds for which the registry's refresh tokens are good, and whose rights they have there.
    life: u64,
    user: &'static str,
    /// The subjects that applications of the tenant believe.
    federated: HashMap<String, String>,
    /// What was shown and given.
    secrets: Vec<String>,
    assertions: usize,
    given: usize,
}

impl Registry {
    async fn start(place: &Place, host: &'static str) -> Result<Self> {
        let options = TokenOptions { service: host.to_owned(), oauth2: true, expires_in: 2, ..TokenOptions::default() };
        let log = place.env.log(&format!("{}-{host}-tokens", place.namespace));
        let tokens = TokenServer::start(&place.env.ca()?, &log, options).await?;
        let Auth::Token { service, issuer, jwks, .. } = tokens.endpoint().auth() else { bail!("it has tokens") };
        let auth = Auth::Token { realm: format!("https://{host}/oauth2/token"), service, issuer, jwks };
        let options = RegistryOptions { name: host.to_owned(), auth, ..RegistryOptions::default() };
        Ok(Self { host, tokens, server: RegistryServer::start(place.env, options).await? })
    }
}

impl Azure {
    pub(super) async fn start(place: &Place, hosts: &[&'static str]) -> Result<Arc<Self>> {
        let registries = try_join_all(hosts.iter().map(|host| Registry::start(place, host))).await?;
        let state = Mutex::new(State { life: 600, user: "push", ..State::default() });
        Ok(Arc::new(Self { issuer: super::issuer(place)?, registries, state }))
    }

    /// Makes all of it found under its own names.
    pub(super) fn behind(self: &Arc<Self>, hosts: HostsBuilder) -> HostsBuilder {
        let [entra, metadata] = [(); 2].map(|()| Arc::clone(self));
        let hosts = hosts.function(ENTRA_HOST, "/", move |asked| entra.entra(asked)).function(
            METADATA,
            "/metadata/identity/oauth2/token",
            move |asked| metadata.metadata(asked),
        );
        self.registries.iter().fold(hosts, |hosts, registry| {
            let exchange = Arc::clone(self);
            let url = &registry.tokens.endpoint().url;
            let address = url.trim_start_matches("https://").trim_end_matches("/token");
            hosts
                .function(registry.host, "/oauth2/exchange", move |asked| exchange.exchange(asked))
                .server_at(registry.host, "/oauth2/token", address, "/token")
                .server(registry.host, "/v2/", registry.server.host())
        })
    }

    /// Lets an application believe a subject.
    pub(super) fn federate(&self, client: &str, subject: &str) {
        self.state().federated.insert(client.to_owned(), subject.to_owned());
    }

    /// A token of Entra's that somebody has.
    pub(super) fn give_out(&self, token: &str) {
        self.state().secrets.push(token.to_owned());
    }

    /// The token server of the first registry.
    fn tokens(&self) -> &TokenServer {
        &self.registries[0].tokens
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `POST /<tenant>/oauth2/v2.0/token` with a client assertion (learn.microsoft.com, "OAuth 2.0 client credentials flow",
    /// third case).
    fn entra(&self, asked: &Asked) -> Answer {
        let form = asked.form();
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        let mut state = self.state();
        state.assertions += 1;
        state.secrets.push(field("client_assertion").to_owned());
        let is_well_formed = field("grant_type") == "client_credentials"
            && field("client_assertion_type") == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
            && field("scope") == "https://containerregistry.azure.net/.default";
        let refuse = |status, error: &str, code: u32, words: &str| {
            let description = format!("AADSTS{code}: {words} Trace ID: 255d1aef\r\nCorrelation ID: d15bc17");
            (status, json!({"error": error, "error_description": description, "error_codes": [code]}).to_string())
        };
        if asked.method != "POST" || !is_well_formed {
            return refuse(400, "invalid_request", 900_144, "The request body is not as documented.");
        }
        if asked.uri.path() != format!("/{TENANT}/oauth2/v2.0/token") {
            return refuse(400, "invalid_request", 90002, "Tenant not found.");
        }
        let Some(believed) = state.federated.get(field("client_id")) else {
            return refuse(400, "unauthorized_client", 700_016, "The application was not found in the directory.");
        };
        match self.issuer.subject(field("client_assertion"), AUDIENCE) {
            Ok(subject) if subject == *believed => (200, state.give()),
            Ok(subject) => {
                // It repeats what it was shown, as no server should.
                let words =
                    format!("No matching federated identity record found for presented assertion subject '{subject}'");
                let words = if believed == "echo" { field("client_assertion") } else { &words };
                refuse(401, "invalid_client", 700_213, words)
            }
            Err(error) => refuse(401, "invalid_client", 50027, &format!("JWT token is invalid: {error}.")),
        }
    }

    /// `GET /metadata/identity/oauth2/token` (learn.microsoft.com, "How to use managed identities on a virtual machine").
    fn metadata(&self, asked: &Asked) -> Answer {
        let query = asked.uri.query().unwrap_or_default();
        let is_well_formed = asked.header("metadata") == "true"
            && query.contains("resource=https%3A%2F%2Fcontainerregistry.azure.net")
            && query.contains("client_id=kubelet-identity");
        if !is_well_formed {
            return (400, json!({"error": "invalid_request", "error_description": "Identity not found"}).to_string());
        }
        (200, self.state().give())
    }

    fn exchange(&self, asked: &Asked) -> Answer {
        let form = asked.form();
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        let registry = self.registries.iter().find(|registry| registry.host == field("service"));
        let mut state = self.state();
        let tenant_is_fine = ["", TENANT].contains(&field("tenant"));
        let is_known =
            !field("access_token").is_empty() && state.secrets.iter().any(|given| given == field("access_token"));
        let registry = registry.filter(|registry| registry.host == asked.host);
        let is_fine = field("grant_type") == "access_token" && tenant_is_fine && is_known;
        let Some(registry) = registry.filter(|_| is_fine) else {
            let error = json!({"code": "UNAUTHORIZED", "message": "authentication required"});
            return (401, json!({"errors": [error]}).to_string());
        };
        let refresh = registry.tokens.refresh_token_for(state.user, state.life);
        state.secrets.push(refresh.clone());
        (200, json!({"refresh_token": refresh}).to_string())
    }
}

impl State {
    fn give(&mut self) -> String {
        self.given += 1;
        let token = format!("entra-token-{:032x}", fastrand::u128(..));
        self.secrets.push(token.clone());
        json!({
            "access_token": token, "expires_in": 3599, "ext_expires_in": 3599, "token_type": "Bearer",
            "expires_on": "4102444800", "resource": "https://containerregistry.azure.net",
        })
        .to_string()
    }
}

/// Azure with one registry, under its own names.
struct Cloud {
    azure: Arc<Azure>,
    hosts: Hosts,
}

impl Cloud {
    async fn start(place: &Place) -> Result<Self> {
        let azure = Azure::start(place, &[REGISTRY]).await?;
        let hosts = azure.behind(HostsBuilder::default()).start(&place.env.ca()?).await?;
        Ok(Self { azure, hosts })
    }

    fn config(&self, place: &Place) -> serde_json::Value {
        let mut registries = self.hosts.registries(&place.env.ca_path);
        // Reached at an address that is closed, as the real one is.
        for registry in registries.as_array_mut().into_iter().flatten() {
            if registry["host"] == METADATA {
                registry["proxy"] = self.hosts.closed_url().into();
            }
        }
        json!({"registries": registries, "networks": {"allow": ["127.0.0.1/32"]}})
    }
}

pub(super) fn annotations(client: &str, tenant: &str) -> serde_json::Value {
    json!({"azure.workload.identity/client-id": client, "azure.workload.identity/tenant-id": tenant})
}

#[tokio::test]
async fn a_service_account_logs_in_at_azure_and_its_login_is_renewed_before_its_end() -> Result<()> {
    let place = Place::new("azure-account").await?;
    place.make_tokens()?;
    let cloud = Cloud::start(&place).await?;
    cloud.azure.federate("client-a", &subject(&place, "mirror"));
    service_account(&place, "mirror", annotations("client-a", TENANT)).await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let operator = place.operator_from(cloud.config(&place), &json!({}), TALKATIVE)?;
    place.apply("m", &spec(&place, "azure", REGISTRY, "team/{name}", Some("mirror"))).await?;
    place.until_ready("m").await?;
    let given = || cloud.azure.state().given;
    ensure!(given() == 1, "{:?}", cloud.hosts.asked());
    // What is refused is renewed at once; from then on they are short.
    cloud.azure.state().life = 3;
    let first = cloud.azure.state().secrets.last().cloned().unwrap_or_default();
    cloud.azure.tokens().revoke(&first);
    images_come_over_until(&place, &["m"], || given() >= 4).await?;
    let requests = cloud.azure.tokens().endpoint().requests()?;
    // Of several requests at one time each may show what is revoked.
    let mut statuses: Vec<_> = requests.iter().map(|asked| asked.status).collect();
    statuses.dedup();
    ensure!(statuses == [200, 401, 200], "{requests:?}");
    // One token of the ServiceAccount for each exchange, and of no other one.
    let made = audit::asked(place.env, &place.namespace)?;
    let made: Vec<_> = made.iter().filter(|asked| asked.verb == "create").map(|asked| asked.name.as_str()).collect();
    ensure!(made.len() == cloud.azure.state().assertions && made.iter().all(|name| *name == "mirror"), "{made:?}");
    let secrets = cloud.azure.state().secrets.clone();
    nothing_is_told(&place, &operator, &secrets).await
}

#[tokio::test]
async fn what_is_wrong_with_an_identity_at_azure_is_said_with_what_to_do() -> Result<()> {
    let place = Place::new("azure-wrong").await?;
    let cloud = Cloud::start(&place).await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let operator = place.operator_from(cloud.config(&place), &json!({}), TALKATIVE)?;
    cloud.azure.federate("client-a", &subject(&place, "mirror"));
    // What another namespace is, this one is not.
    cloud.azure.federate("client-b", "system:serviceaccount:another:of-another");
    cloud.azure.federate("client-c", "echo");
    let issuer = cloud.azure.issuer.name().to_owned();
    let federate = |name: &str| {
        let subject = subject(&place, name);
        format!("a federated credential with the issuer {issuer}, the subject {subject} and the audience {AUDIENCE}")
    };
    for (account, annotations) in [
        ("mirror", annotations("client-a", TENANT)),
        ("bare", json!({})),
        ("of-another", annotations("client-b", TENANT)),
        ("echoed", annotations("client-c", TENANT)),
        ("unknown", annotations("client-z", TENANT)),
        ("elsewhere", annotations("client-a", "another-tenant")),
        ("no-tenant", annotations("client-a", "no tenant/..")),
    ] {
        service_account(&place, account, annotations).await?;
    }
    place.apply("mirror", &spec(&place, "azure", REGISTRY, "mirror/{name}", Some("mirror"))).await?;
    let status = place.until_reason("mirror", "Forbidden").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("serviceAccountTokens.create"), "{status:?}");
    place.make_tokens()?;
    for (account, reason, said) in [
        (Some("bare"), "SecretInvalid", vec!["lacks the annotation azure.workload.identity/client-id".to_owned()]),
        (Some("nobody"), "SecretNotFound", vec!["ServiceAccount \"nobody\" does not exist".to_owned()]),
        (
            Some("of-another"),
            "AuthenticationFailed",
            vec![ENTRA_HOST.into(), "AADSTS700213".into(), federate("of-another")],
        ),
        (Some("echoed"), "AuthenticationFailed", vec!["401 AADSTS700213".into(), federate("echoed")]),
        (
            Some("unknown"),
            "AuthenticationFailed",
            vec!["400 AADSTS700016".into(), "correct the annotations of ServiceAccount \"unknown\"".into()],
        ),
        (
            Some("elsewhere"),
            "AuthenticationFailed",
            vec!["AADSTS90002, Tenant not found.".into(), "tenant-id is another-tenant".into()],
        ),
        (Some("no-tenant"), "SecretInvalid", vec!["azure.workload.identity/tenant-id: invalid tenant ID".into()]),
        (None, "Forbidden", vec!["identityNamespaces".into()]),
    ] {
        let name = account.unwrap_or("own");
        place.apply(name, &spec(&place, "azure", REGISTRY, &format!("{name}/{{name}}"), account)).await?;
        let status = place.until_reason(name, reason).await?.status.unwrap_or_default();
        let found = message(&status, "Ready");
        ensure!(said.iter().all(|said| found.contains(said)), "{name}: {found}");
        ensure!(!found.contains("spec.target.secretRef"), "{name}: {found}");
    }
    ensure!(cloud.azure.state().given == 0, "{:?}", cloud.hosts.asked());
    let secrets = cloud.azure.state().secrets.clone();
    nothing_is_told(&place, &operator, &secrets).await
}

#[tokio::test]
async fn an_identity_without_a_role_at_the_registry_is_told_which_one() -> Result<()> {
    let place = Place::new("azure-role").await?;
    place.make_tokens()?;
    let cloud = Cloud::start(&place).await?;
    cloud.azure.federate("client-a", &subject(&place, "mirror"));
    cloud.azure.state().user = "pull";
    service_account(&place, "mirror", annotations("client-a", TENANT)).await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let _operator = place.operator_from(cloud.config(&place), &json!({}), "debug")?;
    place.apply("m", &spec(&place, "azure", REGISTRY, "team/{name}", Some("mirror"))).await?;
    let status = place.until_reason("m", "AuthenticationFailed").await?.status.unwrap_or_default();
    let said = message(&status, "Ready");
    ensure!(said.contains("AcrPush to write") && !said.contains("secretRef"), "{said}");
    Ok(())
}

#[tokio::test]
async fn the_operators_own_identity_at_azure_is_that_of_its_pod_else_of_its_machine() -> Result<()> {
    let place = Place::new("azure-own").await?;
    let cloud = Cloud::start(&place).await?;
    cloud.azure.federate("operator", &subject(&place, "imagemirror"));
    let token = place.kubectl(&["create", "token", "imagemirror", &format!("--audience={AUDIENCE}")])?;
    let file = place.env.run_dir.join(format!("{}.token", place.namespace));
    std::fs::write(&file, token.trim())?;
    let mut config = cloud.config(&place);
    config["identityNamespaces"] = json!([place.namespace]);
    let config = place.settings(config, &json!({}))?;
    let file = file.display().to_string();
    let of_pod = [("AZURE_CLIENT_ID", "operator"), ("AZURE_TENANT_ID", TENANT), ("AZURE_FEDERATED_TOKEN_FILE", &*file)];
    let of_machine = [("AZURE_CLIENT_ID", "kubelet-identity")];
    let mut entra = Vec::new();
    for (name, variables) in [("pod", &of_pod[..]), ("machine", &of_machine)] {
        place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
        let operator = place.operator_where(&config, &["--log-level", TALKATIVE], variables)?;
        place.apply(name, &spec(&place, "azure", REGISTRY, &format!("{name}/{{name}}"), None)).await?;
        place.until_ready(name).await?;
        entra.push(cloud.azure.state().assertions);
        let secrets = cloud.azure.state().secrets.clone();
        nothing_is_told(&place, &operator, &secrets).await?;
        operator.process.stop().await?;
    }
    let of_machine = cloud.hosts.asked().iter().filter(|line| line.contains(METADATA)).count();
    ensure!(entra == [1, 1] && of_machine == 1, "{entra:?} {:?}", cloud.hosts.asked());
    Ok(())
}
