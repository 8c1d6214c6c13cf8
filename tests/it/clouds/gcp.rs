//! Google Artifact Registry (cloud.google.com, "Workload Identity Federation with Kubernetes" and "Configure authentication to
//! Artifact Registry for Docker").

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use testenv::{
    Hosts, Image, RegistryOptions, RegistryServer,
    hosts::{Answer, Asked, HostsBuilder},
    oidc::Issuer,
    registry::Auth,
    token::{TokenOptions, TokenServer, User},
};

use super::{TALKATIVE, images_come_over_until, nothing_is_told, service_account, spec, subject};
use crate::support::{Place, message};

pub(super) const REGISTRY: &str = "europe-west1-docker.pkg.dev";
const STS: &str = "sts.googleapis.com";
const IAM: &str = "iamcredentials.googleapis.com";
const METADATA: &str = "metadata.google.internal";
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
pub(super) const CLUSTER: &str = "projects/my-project/locations/europe-west1/clusters/c1";
const PROVIDER: &str = "projects/4711/locations/global/workloadIdentityPools/pool/providers/k8s";
pub(super) const EMAIL: &str = "mirror@my-project.iam.gserviceaccount.com";

/// Google's token services, its metadata server and a registry.
pub(super) struct Google {
    issuer: Issuer,
    tokens: TokenServer,
    registry: RegistryServer,
    /// Seconds for which its tokens are good.
    life: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What registries take, and what was not given yet of it.
    passwords: Vec<String>,
    /// Federated tokens, and the subjects that they are.
    federated: Vec<(String, String)>,
    /// What was shown and given.
    secrets: Vec<String>,
    impersonated: Vec<String>,
}

fn oauth(status: u16, error: &str, description: &str) -> Answer {
    (status, json!({"error": error, "error_description": description}).to_string())
}

fn refusal(code: u16, status: &str, message: &str) -> Answer {
    (code, json!({"error": {"code": code, "status": status, "message": message}}).to_string())
}

impl Google {
    /// Its tokens are good for `life` seconds and for this at the registry; passwords that are not its own are those of [`TokenOptions`].
    pub(super) async fn start(place: &Place, life: u64, grants: &[&str]) -> Result<Arc<Self>> {
        let passwords: Vec<_> = (0..64).map(|_| format!("ya29.token-{:032x}", fastrand::u128(..))).collect();
        let user = |password: &String| User::new("oauth2accesstoken", password, grants);
        let mut options = TokenOptions { service: REGISTRY.to_owned(), expires_in: 1, ..TokenOptions::default() };
        options.users.extend(passwords.iter().map(user));
        let log = place.env.log(&format!("{}-gar-tokens", place.namespace));
        let tokens = TokenServer::start(&place.env.ca()?, &log, options).await?;
        let Auth::Token { service, issuer, jwks, .. } = tokens.endpoint().auth() else { bail!("it has tokens") };
        let auth = Auth::Token { realm: format!("https://{REGISTRY}/v2/token"), service, issuer, jwks };
        let options = RegistryOptions { name: "gar".into(), auth, ..RegistryOptions::default() };
        let registry = RegistryServer::start(place.env, options).await?;
        let state = Mutex::new(State { passwords, ..State::default() });
        Ok(Arc::new(Self { issuer: super::issuer(place)?, tokens, registry, life, state }))
    }

    /// Makes all of it found under its own names.
    pub(super) fn behind(self: &Arc<Self>, hosts: HostsBuilder) -> HostsBuilder {
        let [sts, iam, metadata] = [(); 3].map(|()| Arc::clone(self));
        let url = &self.tokens.endpoint().url;
        let address = url.trim_start_matches("https://").trim_end_matches("/token");
        hosts
            .function(STS, "/", move |asked| sts.sts(asked))
            .function(IAM, "/", move |asked| iam.iam(asked))
            .function(METADATA, "/computeMetadata/v1/instance/service-accounts/default/token", move |asked| {
                metadata.metadata(asked)
            })
            .server_at(REGISTRY, "/v2/token", address, "/token")
            .server(REGISTRY, "/v2/", self.registry.host())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `POST /v1/token` (cloud.google.com, "Security Token Service API").
    fn sts(&self, asked: &Asked) -> Answer {
        let form = asked.form();
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        let is_well_formed = field("grant_type") == "urn:ietf:params:oauth:grant-type:token-exchange"
            && field("requested_token_type") == "urn:ietf:params:oauth:token-type:access_token"
            && field("subject_token_type") == "urn:ietf:params:oauth:token-type:jwt"
            && field("scope") == SCOPE;
        if asked.method != "POST" || asked.uri.path() != "/v1/token" || !is_well_formed {
            return oauth(400, "invalid_request", "It is not as documented.");
        }
        let of_cluster =
            format!("identitynamespace:my-project.svc.id.goog:https://container.googleapis.com/v1/{CLUSTER}");
        let audience = match field("audience") {
            audience if audience == of_cluster => "my-project.svc.id.goog".to_owned(),
            audience if audience == format!("//iam.googleapis.com/{PROVIDER}") => format!("https:{audience}"),
            _ => {
                return oauth(
                    400,
                    "invalid_target",
                    "The target service indicated by the \"audience\" parameters is invalid.",
                );
            }
        };
        let mut state = self.state();
        state.secrets.push(field("subject_token").to_owned());
        match self.issuer.subject(field("subject_token"), &audience) {
            Ok(subject) if subject.ends_with(":distrusted") => {
                // It repeats what it was shown, as no server should.
                oauth(400, "invalid_grant", &format!("The given credential {} is rejected.", field("subject_token")))
            }
            Ok(subject) => {
                let token = state.give();
                state.federated.push((token.clone(), subject));
                let life = self.life;
                (200, json!({"access_token": token, "token_type": "Bearer", "expires_in": life}).to_string())
            }
            Err(error) => oauth(400, "invalid_grant", &format!("ID Token is invalid: {error}")),
        }
    }

    /// `POST /v1/projects/-/serviceAccounts/<email>:generateAccessToken` (cloud.google.com, "IAM Service Account Credentials").
    fn iam(&self, asked: &Asked) -> Answer {
        let mut state = self.state();
        let bearer = asked.header("authorization").strip_prefix("Bearer ").unwrap_or_default();
        let Some(subject) = state.federated.iter().find(|(token, _)| token == bearer).map(|(_, who)| who.clone())
        else {
            return refusal(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.");
        };
        let wanted: Value = serde_json::from_slice(&asked.body).unwrap_or_default();
        if wanted != json!({"scope": [SCOPE], "lifetime": "3600s"}) {
            return refusal(400, "INVALID_ARGUMENT", "It is not as documented.");
        }
        let path = asked.uri.path().to_owned();
        match path
            .strip_prefix("/v1/projects/-/serviceAccounts/")
            .and_then(|rest| rest.strip_suffix(":generateAccessToken"))
        {
            Some(EMAIL) if subject.ends_with(":mirror") => {
                state.impersonated.push(subject);
                let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(self.life.cast_signed());
                (200, json!({"accessToken": state.give(), "expireTime": end.to_string()}).to_string())
            }
            Some(EMAIL) => refusal(
                403,
                "PERMISSION_DENIED",
                "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist).",
            ),
            _ => refusal(404, "NOT_FOUND", "Unknown service account"),
        }
    }

    /// `GET /computeMetadata/v1/instance/service-accounts/default/token` (cloud.google.com, "About VM metadata").
    fn metadata(&self, asked: &Asked) -> Answer {
        if asked.header("metadata-flavor") != "Google" {
            return (403, "Missing Metadata-Flavor:Google header.".to_owned());
        }
        (200, json!({"access_token": self.state().give(), "expires_in": 3599, "token_type": "Bearer"}).to_string())
    }
}

impl State {
    fn give(&mut self) -> String {
        let token = self.passwords.pop().unwrap_or_default();
        self.secrets.push(token.clone());
        token
    }
}

/// Google under its own names.
struct Cloud {
    google: Arc<Google>,
    hosts: Hosts,
}

impl Cloud {
    async fn start(place: &Place, life: u64) -> Result<Self> {
        Self::granting(place, life, &["pull", "push"]).await
    }

    async fn granting(place: &Place, life: u64, grants: &[&str]) -> Result<Self> {
        let google = Google::start(place, life, grants).await?;
        let hosts = google.behind(HostsBuilder::default()).start(&place.env.ca()?).await?;
        Ok(Self { google, hosts })
    }

    fn config(&self, place: &Place) -> Value {
        json!({"registries": self.hosts.registries(&place.env.ca_path), "gcp": {"workloadIdentity": CLUSTER}})
    }
}

const TRUST: &str = "imagemirror.dev/gcp-workload-identity";
pub(super) const SERVICE_ACCOUNT: &str = "iam.gke.io/gcp-service-account";

#[tokio::test]
async fn a_service_account_logs_in_at_google_as_itself_or_another_and_its_login_is_renewed_before_its_end() -> Result<()>
{
    let place = Place::new("gcp-account").await?;
    place.make_tokens()?;
    let cloud = Cloud::start(&place, 3).await?;
    service_account(&place, "mirror", json!({SERVICE_ACCOUNT: EMAIL})).await?;
    service_account(&place, "itself", json!({TRUST: PROVIDER})).await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let operator = place.operator_from(cloud.config(&place), &json!({}), TALKATIVE)?;
    for account in ["mirror", "itself"] {
        let repository = format!("my-project/{account}/{{name}}");
        place.apply(account, &spec(&place, "gcp", REGISTRY, &repository, Some(account))).await?;
        place.until_ready(account).await?;
    }
    let asked = |host: &str| cloud.hosts.asked().iter().filter(|line| line.contains(host)).count();
    let is_renewed = || asked(IAM) >= 4 && asked(STS) >= 8;
    images_come_over_until(&place, &["mirror", "itself"], is_renewed).await?;
    let requests = cloud.google.tokens.endpoint().requests()?;
    ensure!(requests.iter().all(|asked| asked.user.is_none() || asked.status == 200), "{requests:?}");
    let own = subject(&place, "mirror");
    let impersonated = cloud.google.state().impersonated.clone();
    ensure!(impersonated.iter().all(|who| *who == own), "{impersonated:?}");
    let secrets = cloud.google.state().secrets.clone();
    nothing_is_told(&place, &operator, &secrets).await
}

#[tokio::test]
async fn what_is_wrong_with_an_identity_at_google_is_said_with_what_to_do() -> Result<()> {
    let place = Place::new("gcp-wrong").await?;
    place.make_tokens()?;
    let cloud = Cloud::start(&place, 600).await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let operator = place.operator_from(cloud.config(&place), &json!({}), TALKATIVE)?;
    let issuer = cloud.google.issuer.name().to_owned();
    let member = format!("serviceAccount:my-project.svc.id.goog[{}/stranger]", place.namespace);
    let pool = PROVIDER.trim_end_matches("/providers/k8s");
    let principal = format!("principal://iam.googleapis.com/{pool}/subject/{}", subject(&place, "foreigner"));
    let other = PROVIDER.replace("k8s", "gone");
    let no_email = "mirror@my-project.iam.gserviceaccount.com/../x";
    for (account, annotations, reason, said) in [
        (
            "distrusted",
            json!({}),
            "AuthenticationFailed",
            vec![
                format!("{STS}: 400 invalid_grant"),
                format!("check that {CLUSTER} is there and trusts the issuer {issuer}"),
            ],
        ),
        ("untrusted", json!({TRUST: other}), "AuthenticationFailed", vec!["invalid_target".into(), other.clone()]),
        (
            "stranger",
            json!({SERVICE_ACCOUNT: EMAIL}),
            "PermissionDenied",
            vec![
                format!("{IAM}: 403 PERMISSION_DENIED"),
                format!("grant {member} the role roles/iam.workloadIdentityUser on {EMAIL}"),
            ],
        ),
        (
            "foreigner",
            json!({SERVICE_ACCOUNT: EMAIL, TRUST: PROVIDER}),
            "PermissionDenied",
            vec![format!("grant {principal} the role")],
        ),
        (
            "nobody",
            json!({SERVICE_ACCOUNT: "gone@my-project.iam.gserviceaccount.com"}),
            "AuthenticationFailed",
            vec!["Google knows no service account gone@".into(), SERVICE_ACCOUNT.into()],
        ),
        ("path", json!({SERVICE_ACCOUNT: no_email}), "SecretInvalid", vec![SERVICE_ACCOUNT.into()]),
        ("form", json!({TRUST: "my-cluster"}), "SecretInvalid", vec![TRUST.into(), "workloadIdentityPools".into()]),
    ] {
        service_account(&place, account, annotations).await?;
        let repository = format!("my-project/{account}/{{name}}");
        place.apply(account, &spec(&place, "gcp", REGISTRY, &repository, Some(account))).await?;
        let status = place.until_reason(account, reason).await?.status.unwrap_or_default();
        let found = message(&status, "Ready");
        ensure!(said.iter().all(|said| found.contains(said)), "{account}: {found}");
        ensure!(!found.contains("spec.target.secretRef"), "{account}: {found}");
    }
    let secrets = cloud.google.state().secrets.clone();
    nothing_is_told(&place, &operator, &secrets).await?;
    ensure!(!cloud.hosts.asked().iter().any(|line| line.contains("/v2/token") || line.contains("CONNECT")));
    Ok(())
}

#[tokio::test]
async fn an_identity_without_a_role_at_the_registry_is_told_which_one() -> Result<()> {
    let place = Place::new("gcp-role").await?;
    place.make_tokens()?;
    let cloud = Cloud::granting(&place, 600, &["pull"]).await?;
    service_account(&place, "mirror", json!({TRUST: PROVIDER})).await?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let _operator = place.operator_from(cloud.config(&place), &json!({}), "debug")?;
    place.apply("m", &spec(&place, "gcp", REGISTRY, "my-project/r/{name}", Some("mirror"))).await?;
    let status = place.until_reason("m", "AuthenticationFailed").await?.status.unwrap_or_default();
    let said = message(&status, "Ready");
    ensure!(said.contains("roles/artifactregistry.reader or writer") && !said.contains("secretRef"), "{said}");
    Ok(())
}

#[tokio::test]
async fn without_a_word_of_what_google_trusts_nothing_is_asked() -> Result<()> {
    let place = Place::new("gcp-trust").await?;
    place.make_tokens()?;
    let cloud = Cloud::start(&place, 600).await?;
    let mut config = cloud.config(&place);
    config["gcp"] = json!({});
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let _operator = place.operator_from(config, &json!({}), "debug")?;
    service_account(&place, "mirror", json!({SERVICE_ACCOUNT: EMAIL})).await?;
    place.apply("m", &spec(&place, "gcp", REGISTRY, "my-project/r/{name}", Some("mirror"))).await?;
    let status = place.until_reason("m", "SecretInvalid").await?.status.unwrap_or_default();
    let found = message(&status, "Ready");
    ensure!(found.contains(TRUST) && found.contains("gcp.workloadIdentity"), "{found}");
    ensure!(cloud.hosts.asked().is_empty(), "{:?}", cloud.hosts.asked());
    Ok(())
}

/// What is refused is had anew, although the crate that finds it keeps it.
#[tokio::test]
async fn the_operators_own_identity_at_google_is_that_of_the_metadata_server() -> Result<()> {
    let place = Place::new("gcp-own").await?;
    let cloud = Cloud::start(&place, 600).await?;
    let mut config = cloud.config(&place);
    config["identityNamespaces"] = json!([place.namespace]);
    let config = place.settings(config, &json!({}))?;
    place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
    let url = cloud.hosts.url();
    let operator = place.operator_where(&config, &["--log-level", TALKATIVE], &[("http_proxy", &*url)])?;
    place.apply("m", &spec(&place, "gcp", REGISTRY, "my-project/r/{name}", None)).await?;
    place.until_ready("m").await?;
    let asked = || cloud.hosts.asked().iter().filter(|line| line.contains(METADATA)).count();
    ensure!(asked() == 1, "{:?}", cloud.hosts.asked());
    let first = cloud.google.state().secrets.last().cloned().unwrap_or_default();
    cloud.google.tokens.revoke(&first);
    images_come_over_until(&place, &["m"], || asked() == 2).await?;
    let secrets = cloud.google.state().secrets.clone();
    nothing_is_told(&place, &operator, &secrets).await
}
