//! Logins that stay as they are written, as users make them for each registry: pull secrets of
//! `kubectl create secret docker-registry`, identity tokens, and on the command line the environment.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures::future::try_join_all;
use serde_json::json;
use testenv::{
    Image, RegistryOptions, RegistryServer,
    hosts::HostsBuilder,
    registry::Auth,
    token::{TokenOptions, TokenServer, User},
};

use crate::support::{Place, run};

/// What a registry answers 401 with.
#[derive(Clone, Copy)]
enum Asks {
    Basic,
    /// The token server's host and path, and the service.
    Bearer(&'static str, &'static str, &'static str),
}

use Asks::{Basic, Bearer};

/// What is in the Secret.
#[derive(Clone, Copy)]
enum Login {
    /// Made by `kubectl create secret docker-registry`: server, user, password.
    Kubectl(&'static str, &'static str, &'static str),
    /// The same with a refresh token of the registry as the password of this user.
    Refresh(&'static str, &'static str),
    /// `identitytoken` in a Docker configuration that `docker login` wrote.
    IdentityToken(&'static str),
}

use Login::{IdentityToken, Kubectl, Refresh};

const KEY: &str =
    "{\n  \"type\": \"service_account\",\n  \"private_key\": \"-----BEGIN PRIVATE KEY-----\\nMIIE+/=\\n\"\n}\n";
const NOBODY: &str = "00000000-0000-0000-0000-000000000000";
const ECR: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
const GAR: &str = "europe-west1-docker.pkg.dev";

/// The host as in images, the host that is dialled, what it asks for, what users have for it.
#[rustfmt::skip]
const ROWS: &[(&str, &str, Asks, Login)] = &[
    ("docker.io", "registry-1.docker.io", Bearer("auth.docker.io", "/token", "registry.docker.io"),
        Kubectl("https://index.docker.io/v1/", "team", "dckr_pat_A-b")),
    ("ghcr.io", "ghcr.io", Bearer("ghcr.io", "/token", "ghcr.io"), Kubectl("ghcr.io", "anybody", "ghp_0123")),
    ("quay.io", "quay.io", Bearer("quay.io", "/v2/auth", "quay.io"), Kubectl("quay.io", "team+robot", "QUAYTOKEN")),
    ("registry.gitlab.com", "registry.gitlab.com", Bearer("gitlab.com", "/jwt/auth", "container_registry"),
        Kubectl("registry.gitlab.com", "gitlab+deploy-token-1", "gldt-x_y")),
    ("gcr.io", "gcr.io", Bearer("gcr.io", "/v2/token", "gcr.io"), Kubectl("https://gcr.io", "oauth2accesstoken", "ya29.a0-x")),
    ("eu.gcr.io", "eu.gcr.io", Bearer("eu.gcr.io", "/v2/token", "eu.gcr.io"), Kubectl("eu.gcr.io", "_json_key", KEY)),
    (GAR, GAR, Bearer(GAR, "/v2/token", GAR), Kubectl(GAR, "_json_key", KEY)),
    ("harbor.example.com", "harbor.example.com", Bearer("harbor.example.com", "/service/token", "harbor-registry"),
        Kubectl("https://harbor.example.com/", "robot$team+push", "Zx$1 y")),
    ("team.jfrog.io", "team.jfrog.io", Bearer("team.jfrog.io", "/v2/token", "team.jfrog.io"), Kubectl("team.jfrog.io", "ci@example.com", "cmVm:x")),
    ("artifactory.example.com", "artifactory.example.com", Basic, Kubectl("artifactory.example.com/team", "ci", "AKCp8")),
    (ECR, ECR, Basic, Kubectl(ECR, "AWS", "eyJwYXlsb2FkIjoi==")),
    ("one.azurecr.io", "one.azurecr.io", Bearer("one.azurecr.io", "/oauth2/token", "one.azurecr.io"),
        Kubectl("one.azurecr.io", "e5f1f7a0-0000-4000-8000-000000000001", "a~secret.of-a_principal")),
    ("two.azurecr.io", "two.azurecr.io", Bearer("two.azurecr.io", "/oauth2/token", "two.azurecr.io"), Kubectl("two.azurecr.io", NOBODY, "eyJhbGciOi.JSUzI1NiIs.ImtpZCI6")),
    ("three.azurecr.io", "three.azurecr.io", Bearer("three.azurecr.io", "/oauth2/token", "three.azurecr.io"), Refresh("three.azurecr.io", "<token>")),
    ("four.azurecr.io", "four.azurecr.io", Bearer("four.azurecr.io", "/oauth2/token", "four.azurecr.io"), IdentityToken("four.azurecr.io")),
];

/// A registry that asks as the one of a row does, and the Secret for it.
struct Stand {
    row: usize,
    _registry: RegistryServer,
    tokens: Option<TokenServer>,
}

impl Stand {
    async fn start(place: &Place, row: usize, hosts: HostsBuilder) -> Result<(Self, HostsBuilder)> {
        let (_, dialled, asks, login) = ROWS[row];
        let env = place.env;
        let (user, password) = match login {
            Kubectl(_, user, password) => (user, password),
            Refresh(..) | IdentityToken(_) => ("owner", "is not told"),
        };
        let (auth, tokens, hosts) = match asks {
            Basic => (Auth::Htpasswd(vec![(user.to_owned(), password.to_owned())]), None, hosts),
            Bearer(realm, path, service) => {
                let users = vec![User::new(user, password, &["pull", "push"])];
                let options =
                    TokenOptions { service: service.to_owned(), users, oauth2: true, ..TokenOptions::default() };
                let tokens = TokenServer::start(&env.ca()?, &env.log(&format!("logins-tokens-{row}")), options).await?;
                let Auth::Token { issuer, jwks, .. } = tokens.endpoint().auth() else { anyhow::bail!("no tokens") };
                let address = tokens.endpoint().url.clone();
                let address = address.trim_start_matches("https://").trim_end_matches("/token");
                let hosts = hosts.server_at(realm, path, address, "/token");
                let realm = format!("https://{realm}{path}");
                (Auth::Token { realm, service: service.to_owned(), issuer, jwks }, Some(tokens), hosts)
            }
        };
        let options = RegistryOptions { name: format!("logins-{row}"), auth, ..RegistryOptions::default() };
        let registry = RegistryServer::start(env, options).await?;
        let hosts = hosts.server(dialled, "/v2/", registry.host());
        Ok((Self { row, _registry: registry, tokens }, hosts))
    }

    fn name(&self) -> String {
        format!("login-{}", self.row)
    }

    /// Makes the Secret as a user does.
    fn make_secret(&self, place: &Place) -> Result<()> {
        let refresh = || Ok::<_, anyhow::Error>(self.tokens.as_ref().context("no tokens")?.refresh_token("owner"));
        let name = self.name();
        let with = |server: &str, user: &str, password: &str| {
            let [server, user, password] = [("server", server), ("username", user), ("password", password)]
                .map(|(flag, value)| format!("--docker-{flag}={value}"));
            place.kubectl(&[
                "create",
                "secret",
                "docker-registry",
                &name,
                &server,
                &user,
                &password,
                "--dry-run=client",
                "-o",
                "yaml",
            ])
        };
        let manifest = match ROWS[self.row].3 {
            Kubectl(server, user, password) => with(server, user, password)?,
            Refresh(server, user) => with(server, user, &refresh()?)?,
            IdentityToken(server) => {
                let entry = json!({"auth": STANDARD.encode(format!("{NOBODY}:")), "identitytoken": refresh()?});
                let file = place.env.run_dir.join(format!("{}-{name}.json", place.namespace));
                std::fs::write(&file, json!({"auths": {server: entry}}).to_string())?;
                let from = format!("--from-file=.dockerconfigjson={}", file.display());
                let kind = "--type=kubernetes.io/dockerconfigjson";
                place.kubectl(&["create", "secret", "generic", &name, &from, kind, "--dry-run=client", "-o", "yaml"])?
            }
        };
        let mut apply = Command::new(place.env.tools.join("kubectl"));
        apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["-n", &place.namespace, "apply", "-f", "-"]);
        run(&mut apply, Some(&manifest)).map(|_| ())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_secrets_as_they_are_made_for_every_registry_open_it() -> Result<()> {
    let place = Place::new("logins").await?;
    let image = Image::single(701, &[1000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let (mut hosts, mut stands) = (HostsBuilder::default(), Vec::new());
    for row in 0..ROWS.len() {
        let (stand, with) = Stand::start(&place, row, hosts).await?;
        stand.make_secret(&place)?;
        hosts = with;
        stands.push(stand);
    }
    let hosts = hosts.start(&place.env.ca()?).await?;
    let _operator =
        place.operator_from(json!({"registries": hosts.registries(&place.env.ca_path)}), &json!({}), "debug")?;
    let there_and_back = stands.iter().map(|stand| there_and_back(&place, stand, &image));
    try_join_all(there_and_back).await?;
    let strangers: Vec<_> = hosts.asked().into_iter().filter(|line| line.starts_with("CONNECT")).collect();
    ensure!(strangers.is_empty(), "{strangers:?}");
    Ok(())
}

/// To the registry, and from there to another one, with the same Secret.
async fn there_and_back(place: &Place, stand: &Stand, image: &Image) -> Result<()> {
    let (host, secret) = (ROWS[stand.row].0, stand.name());
    let back = format!("back-{}", stand.row);
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["target"] = json!({"registry": host, "repository": "team/{name}", "secretRef": {"name": secret}});
    place.apply(&secret, &spec).await?;
    place.until_ready(&secret).await.context(host)?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[]);
    spec["imagePullSecrets"] = json!([{"name": secret}]);
    spec["target"]["repository"] = json!(place.repository(&back));
    spec["images"] = json!([{"source": format!("{host}/team/agent:1")}]);
    place.apply(&back, &spec).await?;
    place.until_ready(&back).await.context(host)?;
    ensure!(place.holds(&place.env.target, &back, "1", image).await?, "{host}: it did not come back");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_has_logins_for_the_command_line() -> Result<()> {
    let place = Place::new("environment").await?;
    let env = place.env;
    let mut servers = Vec::new();
    for user in ["first", "second"] {
        let auth = Auth::Htpasswd(vec![(user.to_owned(), format!("{user}-password"))]);
        let options = RegistryOptions { name: user.into(), tls: false, auth, ..RegistryOptions::default() };
        servers.push(RegistryServer::start(env, options).await?);
    }
    let (source, target) = (servers[0].registry(), servers[1].registry());
    let image = Image::single(702, &[1000]);
    place.push(source, "agent", "1", &image).await?;
    let mut spec = place.spec(source, target, &[("agent", &["1"])]);
    spec["target"]["repository"] = json!(place.repository("copy"));
    let file = crate::golden::file(&place, "environment", &[crate::golden::mirror(&place, &spec)])?;
    // The Docker configuration has the second, and for the first another password than the environment.
    let home = env.run_dir.join(format!("{}-docker", place.namespace));
    std::fs::create_dir(&home)?;
    let entry = |user: &str, password: &str| json!({"auth": STANDARD.encode(format!("{user}:{password}"))});
    let auths = json!({&source.host: entry("first", "wrong"), &target.host: entry("second", "second-password")});
    std::fs::write(home.join("config.json"), json!({"auths": auths}).to_string())?;
    let command = |variables: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        command.args(["sync", "-f", &file]).current_dir(&env.run_dir).env("DOCKER_CONFIG", &home);
        command.envs(variables.iter().copied()).output()
    };
    let server = ("TEAM_CONTAINER_REGISTRY_SERVER", &*source.host);
    let user = ("TEAM_CONTAINER_REGISTRY_USER", "first");
    let password = ("TEAM_CONTAINER_REGISTRY_PASSWORD", "first-password");
    for (variables, code, said) in [
        (vec![], 1, "credentials: the Docker configuration"),
        (vec![server, user], 2, "TEAM_CONTAINER_REGISTRY_PASSWORD is not; set it too"),
        (
            vec![server, user, password],
            0,
            "credentials: TEAM_CONTAINER_REGISTRY_* of the environment, then the Docker configuration",
        ),
    ] {
        let output = command(&variables)?;
        let err = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(code) && err.contains(said), "{variables:?}: {:?}: {err}", output.status);
    }
    ensure!(place.holds(target, "copy", "1", &image).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn check_tries_a_login_where_the_registry_really_asks() -> Result<()> {
    let place = Place::new("check-hub").await?;
    let (stand, hosts) = Stand::start(&place, 0, HostsBuilder::default()).await?;
    let hosts = hosts.start(&place.env.ca()?).await?;
    let hub = ROWS[0];
    let Kubectl(server, user, password) = hub.3 else { anyhow::bail!("a password") };
    let mut spec = place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]);
    spec["imagePullSecrets"] = json!([{"name": "hub"}]);
    let how = json!({"host": hub.0, "certSecretRef": {"name": "ca"}, "proxySecretRef": {"name": "proxy"}});
    spec["registries"] = json!([how]);
    spec["target"] = json!({"registry": hub.0, "repository": "team/copy", "secretRef": {"name": "hub"}});
    spec["images"] = json!([{"source": "docker.io/team/agent:1"}]);
    for (password, code, expected) in [
        (
            password,
            1,
            ["granted    repository:team/copy:pull,push", "push       works", "docker.io/team/agent:1 does not exist"],
        ),
        (
            "wrong",
            1,
            [
                "https://auth.docker.io/token for the service registry.docker.io",
                "refused",
                "docs/registries/docker-hub.md",
            ],
        ),
    ] {
        let config = json!({"auths": {server: {"username": user, "password": password}}}).to_string();
        let documents = [
            crate::golden::mirror(&place, &spec),
            place.document("hub", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &config)]),
            place.document("proxy", "Opaque", &[("address", &hosts.url())]),
            place.document("ca", "Opaque", &[("ca.crt", &place.env.ca_pem)]),
        ];
        let file = crate::golden::file(&place, "hub", &documents)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        let output = command.args(["check", "-f", &file]).current_dir(&place.env.run_dir).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.code() == Some(code) && expected.iter().all(|text| said.contains(text)), "{said}");
    }
    let asked = hosts.asked();
    ensure!(!asked.iter().any(|line| line.starts_with("PUT") || line.starts_with("POST registry")), "{asked:?}");
    drop(stand);
    Ok(())
}
