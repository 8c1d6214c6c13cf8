//! Amazon Elastic Container Registry, private and public, with access keys, roles of `ServiceAccount`s, and the operator's own
//! identity.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use testenv::{
    Hosts, Image, RegistryOptions, RegistryServer,
    amazon::Amazon,
    hosts::{Answer, HostsBuilder},
    registry::Auth,
    token::{TokenOptions, TokenServer, User},
};

use super::{TALKATIVE, nothing_is_told, service_account};
use crate::support::{Place, message};

pub(super) const REGISTRY: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
const API: &str = "api.ecr.eu-west-1.amazonaws.com";
const STS: &str = "sts.eu-west-1.amazonaws.com";
const POD_IDENTITY: &str = "169.254.170.23";
const INSTANCE: &str = "169.254.169.254";
const KEY: &str = "AKIAIOSFODNN7EXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
pub(super) const ROLE: &str = "arn:aws:iam::123456789012:role/mirror";

/// A registry of Amazon's and the APIs of ECR and STS.
pub(super) struct Servers {
    pub(super) amazon: Arc<Amazon>,
    pub(super) registry: RegistryServer,
}

impl Servers {
    /// `others` are users besides those whom the API gives its password.
    pub(super) async fn start(place: &Place, others: &[(&str, &str)]) -> Result<Self> {
        let users = [("AWS", "ecr-password-1")].iter().chain(others);
        let users = users.map(|(name, password)| ((*name).to_owned(), (*password).to_owned())).collect();
        let options = RegistryOptions { name: "ecr".into(), auth: Auth::Htpasswd(users), ..RegistryOptions::default() };
        let registry = RegistryServer::start(place.env, options).await?;
        let amazon = Arc::new(Amazon::new("eu-west-1"));
        amazon.add_key(KEY, SECRET);
        amazon.set_password("ecr-password-1");
        Ok(Self { amazon, registry })
    }

    /// Makes all of it found under its own names. `guard` answers before the registry does.
    pub(super) fn behind(
        &self,
        hosts: HostsBuilder,
        guard: impl Fn(&Amazon, &http::Method, &str) -> Option<Answer> + Send + Sync + 'static,
    ) -> HostsBuilder {
        let [ecr, sts, amazon] = [(); 3].map(|()| Arc::clone(&self.amazon));
        hosts
            .guarded(REGISTRY, "/v2/", self.registry.host(), move |method, path| guard(&amazon, method, path))
            .function(API, "/", move |asked| ecr.ecr(asked))
            .function(STS, "/", move |asked| sts.sts(asked))
    }
}

/// Every repository is there.
pub(super) fn all(_: &Amazon, _: &http::Method, _: &str) -> Option<Answer> {
    None
}

struct Ecr {
    hosts: Hosts,
    amazon: Arc<Amazon>,
    registry: RegistryServer,
}

impl Ecr {
    /// The source has `agent:1`.
    async fn start(
        place: &Place,
        guard: impl Fn(&Amazon, &http::Method, &str) -> Option<Answer> + Send + Sync + 'static,
    ) -> Result<Self> {
        place.push(&place.env.source, "agent", "1", &Image::single(1, &[1000])).await?;
        let servers = Servers::start(place, &[]).await?;
        let [pod, instance] = [(); 2].map(|()| Arc::clone(&servers.amazon));
        let hosts = HostsBuilder::default()
            .function(POD_IDENTITY, "/", move |asked| pod.pod_identity(asked))
            .function_with_headers(INSTANCE, "/", move |asked| instance.instance(asked));
        let hosts = servers.behind(hosts, guard).start(&place.env.ca()?).await?;
        let Servers { amazon, registry } = servers;
        Ok(Self { hosts, amazon, registry })
    }

    fn config(&self, place: &Place) -> Value {
        let mut registries = self.hosts.registries(&place.env.ca_path);
        for registry in registries.as_array_mut().into_iter().flatten() {
            // Reached at an address that is closed, as the real ones are.
            if [POD_IDENTITY, INSTANCE].iter().any(|host| registry["host"] == *host) {
                registry["proxy"] = self.hosts.closed_url().into();
            }
        }
        json!({"registries": registries, "networks": {"allow": ["127.0.0.1/32"]}})
    }

    fn asked(&self, line: &str) -> usize {
        self.hosts.asked().iter().filter(|found| *found == line).count()
    }
}

async fn key_pair(place: &Place, secret: &str) -> Result<()> {
    let auths = json!({"auths": {REGISTRY: {"username": KEY, "password": secret}}}).to_string();
    place.secret("push", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &auths)]).await
}

/// A mirror of `agent:1` in the registry, with an access key.
fn with_key(place: &Place) -> Value {
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["target"] = json!({"registry": REGISTRY, "repository": "team/{name}", "secretRef": {"name": "push"}});
    spec
}

/// The same with an identity.
fn with_identity(place: &Place, account: Option<&str>) -> Value {
    super::spec(place, "aws", REGISTRY, "team/{name}", account)
}

#[tokio::test]
async fn an_access_key_is_exchanged_for_a_password_that_is_had_again_when_it_is_refused() -> Result<()> {
    let place = Place::new("ecr-key").await?;
    let ecr = Ecr::start(&place, all).await?;
    key_pair(&place, "wrong").await?;
    let operator = place.operator_from(ecr.config(&place), &json!({}), "debug")?;
    place.apply("m", &with_key(&place)).await?;
    let status = place.until_reason("m", "AuthenticationFailed").await?.status.unwrap_or_default();
    let said = message(&status, "Ready");
    ensure!(said.contains("InvalidSignatureException") && said.contains("Secret \"push\""), "{said}");
    key_pair(&place, SECRET).await?;
    place.until_ready("m").await?;
    ensure!(ecr.amazon.given() == 1, "{} passwords", ecr.amazon.given());
    // A password that does not last as long as it was said.
    ecr.registry.set_users(&[("AWS".to_owned(), "ecr-password-2".to_owned())])?;
    ecr.amazon.set_password("ecr-password-2");
    place.push(&place.env.source, "agent", "1", &Image::single(2, &[1000])).await?;
    place.request("m").await?;
    place.until_ready("m").await?;
    ensure!(ecr.amazon.given() == 2, "{} passwords", ecr.amazon.given());
    ensure!(!operator.logged()?.contains(SECRET) && !operator.logged()?.contains("ecr-password"));
    Ok(())
}

#[tokio::test]
async fn a_password_is_renewed_before_its_end_and_a_busy_cloud_is_asked_again() -> Result<()> {
    let place = Place::new("ecr-renewed").await?;
    let ecr = Ecr::start(&place, all).await?;
    key_pair(&place, SECRET).await?;
    let throttled = json!({"__type": "ThrottlingException", "message": "Rate exceeded"});
    ecr.amazon.be_busy(vec![(400, throttled.to_string()), (503, String::new()), (500, "{".to_owned())]);
    ecr.amazon.set_life(3);
    let _operator = place.operator_from(ecr.config(&place), &json!({}), "debug")?;
    place.apply("m", &with_key(&place)).await?;
    place.until_ready("m").await?;
    ensure!(ecr.amazon.given() == 1 && ecr.asked(&format!("POST {API}/")) == 4, "{:?}", ecr.hosts.asked());
    super::images_come_over_until(&place, &["m"], || ecr.amazon.given() >= 3).await?;
    Ok(())
}

/// Amazon says 403 to it, and in words alone why.
#[tokio::test]
async fn a_password_that_has_ended_is_had_again() -> Result<()> {
    let place = Place::new("ecr-ended").await?;
    let has_ended = Arc::new(AtomicBool::new(true));
    let until = Arc::clone(&has_ended);
    let ecr = Ecr::start(&place, move |_, method, _| {
        let words = "Your authorization token has expired. Reauthenticate and try again.";
        let answer = json!({"errors": [{"code": "DENIED", "message": words}]});
        let is_asked = method == http::Method::POST && until.swap(false, Ordering::Relaxed);
        is_asked.then(|| (403, answer.to_string()))
    })
    .await?;
    key_pair(&place, SECRET).await?;
    let _operator = place.operator_from(ecr.config(&place), &json!({}), "debug")?;
    place.apply("m", &with_key(&place)).await?;
    let status = place.until_ready("m").await?.status.unwrap_or_default();
    ensure!(
        ecr.amazon.given() == 2 && !has_ended.load(Ordering::Relaxed),
        "{} passwords: {status:?}",
        ecr.amazon.given()
    );
    Ok(())
}

#[tokio::test]
async fn a_repository_that_a_push_needs_is_made_where_the_administrator_says_so() -> Result<()> {
    let place = Place::new("ecr-create").await?;
    let ecr = Ecr::start(&place, |amazon, _, path| amazon.missing(path)).await?;
    key_pair(&place, SECRET).await?;
    let operator = place.operator_from(ecr.config(&place), &json!({}), "debug")?;
    place.apply("m", &with_key(&place)).await?;
    let status = place.until_reason("m", "RepositoryMissing").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("team/agent"), "{}", message(&status, "Ready"));
    ensure!(ecr.amazon.created().is_empty());
    drop(operator);
    let mut config = ecr.config(&place);
    for registry in config["registries"].as_array_mut().context("they are a list")? {
        if registry["host"] == REGISTRY {
            registry["createRepositories"] =
                json!({"tags": {"team": "platform"}, "immutableTags": true, "scanOnPush": true});
        }
    }
    let _operator = place.operator_from(config, &json!({}), "debug")?;
    place.request("m").await?;
    place.until_ready("m").await?;
    let expected = json!({
        "repositoryName": "team/agent", "tags": [{"Key": "team", "Value": "platform"}],
        "imageTagMutability": "IMMUTABLE", "imageScanningConfiguration": {"scanOnPush": true},
    });
    ensure!(ecr.amazon.created() == [expected], "{:?}", ecr.amazon.created());
    Ok(())
}

#[tokio::test]
async fn a_service_account_takes_on_its_role_where_the_operator_may_make_tokens() -> Result<()> {
    let place = Place::new("ecr-role").await?;
    let ecr = Ecr::start(&place, all).await?;
    ecr.amazon.trust(ROLE, &super::subject(&place, "mirror"), super::issuer(&place)?);
    service_account(&place, "mirror", json!({})).await?;
    let operator = place.operator_from(ecr.config(&place), &json!({}), "debug")?;
    place.apply("m", &with_identity(&place, Some("mirror"))).await?;
    let status = place.until_reason("m", "SecretInvalid").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("eks.amazonaws.com/role-arn"), "{}", message(&status, "Ready"));
    service_account(&place, "mirror", json!({"eks.amazonaws.com/role-arn": ROLE})).await?;
    let status = place.until_reason("m", "Forbidden").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("serviceAccountTokens.create"), "{}", message(&status, "Ready"));
    place.make_tokens()?;
    place.request("m").await?;
    place.until_ready("m").await?;
    ensure!(
        ecr.amazon.sessions() == [format!("imagemirror-{}-mirror", place.namespace)],
        "{:?}",
        ecr.amazon.sessions()
    );
    ensure!(ecr.asked(&format!("POST {STS}/")) == 1 && ecr.amazon.given() == 1, "{:?}", ecr.hosts.asked());
    // A role that it may not take on.
    service_account(&place, "other", json!({"eks.amazonaws.com/role-arn": ROLE})).await?;
    place.apply("n", &super::spec(&place, "aws", REGISTRY, "other/{name}", Some("other"))).await?;
    let status = place.until_reason("n", "PermissionDenied").await?.status.unwrap_or_default();
    let (issuer, who) = (super::issuer(&place)?, super::subject(&place, "other"));
    let advice = format!(
        "let the role {ROLE} trust the issuer {} with the subject {who} and the audience sts.amazonaws.com",
        issuer.name()
    );
    let said = message(&status, "Ready");
    ensure!(said.contains("AccessDenied") && said.contains(&advice), "{said}");
    ensure!(!operator.logged()?.contains("eyJ"), "a token is in the log");
    Ok(())
}

#[tokio::test]
async fn the_operators_own_identity_is_for_the_namespaces_that_are_listed() -> Result<()> {
    let place = Place::new("ecr-own").await?;
    let ecr = Ecr::start(&place, all).await?;
    let variables =
        [("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_EC2_METADATA_DISABLED", "true")];
    let mut config = place.settings(ecr.config(&place), &json!({}))?;
    let operator = place.operator_where(&config, &[], &variables)?;
    place.apply("m", &with_identity(&place, None)).await?;
    let status = place.until_reason("m", "Forbidden").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("identityNamespaces"), "{}", message(&status, "Ready"));
    ensure!(ecr.hosts.asked().iter().all(|line| !line.contains(API)), "{:?}", ecr.hosts.asked());
    drop(operator);
    config["identityNamespaces"] = json!([place.namespace]);
    let operator = place.operator_where(&config, &[], &variables)?;
    place.request("m").await?;
    place.until_ready("m").await?;
    ensure!(ecr.amazon.given() == 1);
    drop(operator);
    // Nobody at all.
    let _operator = place.operator_where(&config, &[], &[("AWS_EC2_METADATA_DISABLED", "true")])?;
    place.request("m").await?;
    let status = place.until_reason("m", "AuthenticationFailed").await?.status.unwrap_or_default();
    ensure!(message(&status, "Ready").contains("has no identity at Amazon"), "{}", message(&status, "Ready"));
    Ok(())
}

/// The first of these that there is: IAM roles for service accounts, EKS Pod Identity, the role of the machine.
#[tokio::test]
async fn the_operators_own_identity_at_amazon_is_that_of_its_pod_else_of_its_machine() -> Result<()> {
    let place = Place::new("ecr-pod").await?;
    let ecr = Ecr::start(&place, all).await?;
    ecr.amazon.trust(ROLE, &super::subject(&place, "imagemirror"), super::issuer(&place)?);
    ecr.amazon.set_pod_token("token-of-the-pod");
    ecr.amazon.set_instance_role("nodes");
    let mut config = ecr.config(&place);
    config["identityNamespaces"] = json!([place.namespace]);
    let config = place.settings(config, &json!({}))?;
    let token = place.kubectl(&["create", "token", "imagemirror", "--audience=sts.amazonaws.com"])?;
    let file = |name: &str, text: &str| -> Result<String> {
        let file = place.env.run_dir.join(format!("{}.{name}", place.namespace));
        std::fs::write(&file, text)?;
        Ok(file.display().to_string())
    };
    let (of_role, of_pod) = (file("role", token.trim())?, file("pod", "token-of-the-pod")?);
    let url = format!("http://{POD_IDENTITY}/v1/credentials");
    let role = [
        ("AWS_ROLE_ARN", ROLE),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", &*of_role),
        ("AWS_ROLE_SESSION_NAME", "role"),
        ("AWS_REGION", "eu-west-1"),
    ];
    let pod = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*url), ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &*of_pod)];
    for (name, variables) in [("role", &role[..]), ("pod", &pod), ("instance", &[])] {
        let operator = place.operator_where(&config, &["--log-level", TALKATIVE], variables)?;
        place.apply(name, &super::spec(&place, "aws", REGISTRY, &format!("{name}/{{name}}"), None)).await?;
        place.until_ready(name).await?;
        ensure!(ecr.amazon.sessions().last().is_some_and(|session| session == name), "{:?}", ecr.amazon.sessions());
        let secrets = [token.trim().to_owned(), "token-of-the-pod".into(), "ecr-password-1".into()];
        nothing_is_told(&place, &operator, &secrets).await?;
        operator.process.stop().await?;
    }
    ensure!(ecr.amazon.sessions().len() == 3, "{:?}", ecr.amazon.sessions());
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_with_an_identity_at_amazon_is_said_with_what_to_do() -> Result<()> {
    let place = Place::new("ecr-wrong").await?;
    place.make_tokens()?;
    // The registry takes the password, and no image.
    let ecr = Ecr::start(&place, |_, method, path| {
        let denied =
            json!({"errors": [{"code": "DENIED", "message": "not authorized to perform: ecr:InitiateLayerUpload"}]});
        (method == http::Method::POST && path.contains("/readonly/")).then(|| (403, denied.to_string()))
    })
    .await?;
    ecr.amazon.trust(ROLE, &super::subject(&place, "mirror"), super::issuer(&place)?);
    service_account(&place, "mirror", json!({"eks.amazonaws.com/role-arn": ROLE})).await?;
    let annotations = json!({"eks.amazonaws.com/role-arn": ROLE, "eks.amazonaws.com/audience": "another"});
    service_account(&place, "audience", annotations).await?;
    let operator = place.operator_from(ecr.config(&place), &json!({}), TALKATIVE)?;
    for (name, account, denied, reason, said) in [
        (
            "login",
            "mirror",
            Some("GetAuthorizationToken"),
            "PermissionDenied",
            "allow ecr:GetAuthorizationToken on * in the policy",
        ),
        ("readonly", "mirror", None, "PermissionDenied", "ecr:PutImage"),
        ("audience", "audience", None, "PermissionDenied", "and the audience another"),
    ] {
        ecr.amazon.deny(denied);
        place.apply(name, &super::spec(&place, "aws", REGISTRY, &format!("{name}/{{name}}"), Some(account))).await?;
        let status = place.until_reason(name, reason).await?.status.unwrap_or_default();
        let found = message(&status, "Ready");
        ensure!(found.contains(said) && !found.contains("spec.target.secretRef"), "{name}: {found}");
    }
    nothing_is_told(&place, &operator, &["ecr-password-1".to_owned(), "secret-1".to_owned()]).await
}

#[tokio::test]
async fn the_public_registry_has_an_api_of_its_own() -> Result<()> {
    const PUBLIC: &str = "public.ecr.aws";
    const STS: &str = "sts.us-east-1.amazonaws.com";
    let place = Place::new("ecr-public").await?;
    place.make_tokens()?;
    let (env, ca) = (place.env, place.env.ca()?);
    let mut options = TokenOptions { service: PUBLIC.to_owned(), ..TokenOptions::default() };
    options.users.push(User::new("AWS", "ecr-password-1", &["pull"]));
    let tokens = TokenServer::start(&ca, &env.log(&format!("{}-tokens", place.namespace)), options).await?;
    let Auth::Token { service, issuer, jwks, .. } = tokens.endpoint().auth() else { bail!("it has tokens") };
    let auth = Auth::Token { realm: format!("https://{PUBLIC}/token/"), service, issuer, jwks };
    let options = RegistryOptions { name: "public".into(), auth, ..RegistryOptions::default() };
    let registry = RegistryServer::start(env, options).await?;
    let amazon = Arc::new(Amazon::new("us-east-1"));
    amazon.add_key(KEY, SECRET);
    amazon.set_password("ecr-password-1");
    amazon.trust(ROLE, &super::subject(&place, "mirror"), super::issuer(&place)?);
    service_account(&place, "mirror", json!({"eks.amazonaws.com/role-arn": ROLE})).await?;
    let [ecr, sts] = [(); 2].map(|()| Arc::clone(&amazon));
    let address = tokens.endpoint().url.trim_start_matches("https://").trim_end_matches("/token").to_owned();
    let hosts = HostsBuilder::default()
        .server(PUBLIC, "/v2/", registry.host())
        .server_at(PUBLIC, "/token/", &address, "/token")
        .function("api.ecr-public.us-east-1.amazonaws.com", "/", move |asked| ecr.ecr(asked))
        .function(STS, "/", move |asked| sts.sts(asked))
        .start(&ca)
        .await?;
    let repository = place.repository("agent");
    let client = testenv::Client::behind(&hosts, &env.ca_pem, PUBLIC, ("push", "push-password-4711"))?;
    client.push(&repository, "1", &Image::single(1, &[1000])).await?;
    let auths = json!({"auths": {PUBLIC: {"username": KEY, "password": SECRET}}}).to_string();
    place.secret("pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &auths)]).await?;
    place.pull_secret("push", &[&env.target]).await?;
    let config = json!({"caFile": env.ca_path, "registries": hosts.registries(&env.ca_path)});
    let _operator = place.operator_from(config, &json!({}), "debug")?;
    let spec = |name: &str| {
        json!({
            "images": [{"source": format!("{PUBLIC}/{repository}"), "tags": ["1"]}],
            "target": {"registry": env.target.host, "repository": place.repository(name), "secretRef": {"name": "push"}},
        })
    };
    let (mut by_key, mut by_identity) = (spec("key"), spec("identity"));
    by_key["imagePullSecrets"] = json!([{"name": "pull"}]);
    by_identity["serviceAccountName"] = json!("mirror");
    by_identity["registries"] = json!([{"host": PUBLIC, "provider": "aws"}]);
    for (name, spec) in [("key", by_key), ("identity", by_identity)] {
        place.apply(name, &spec).await?;
        place.until_ready(name).await?;
    }
    let logins: Vec<_> = tokens.endpoint().requests()?.into_iter().filter_map(|request| request.user).collect();
    ensure!(amazon.given() == 2 && amazon.sessions().len() == 1, "{} passwords", amazon.given());
    ensure!(logins.iter().filter(|user| *user == "AWS").count() == 2, "{logins:?}");
    Ok(())
}
