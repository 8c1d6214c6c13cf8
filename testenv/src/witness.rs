//! Independent judges of what is in a registry: programs that share no code with the engine or with our own client.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::client::Client;
use crate::env::Env;
use crate::proxy::{Action, Matcher, Proxy};
use crate::registry::Registry;

/// Lets `crane validate` read all of an image or index; an error says what it finds wrong. It unpacks the layers, so they
/// must be compressed archives, as those of [`Image::archives`](crate::Image::archives) are. Without `layers` (`--fast`)
/// it looks only whether they are there.
pub async fn crane_validate(
    env: &Env,
    registry: &Registry,
    repository: &str,
    reference: &str,
    layers: bool,
) -> Result<()> {
    // crane asks no token server at a loopback address, so a proxy adds a token of ours to what it sends.
    let mut proxy = None;
    if let Some(token) = Client::new(env, registry)?.token_for(repository).await? {
        let proxy = proxy.insert(Proxy::to(env, &registry.anonymous()).start().await?);
        proxy.rule(Matcher::new(), Action::set_request_header("Authorization", &format!("Bearer {token}")));
    }
    let registry = proxy.as_ref().map_or(registry, Proxy::registry);
    let name = name(registry, repository, reference);
    let config = tempfile::Builder::new().prefix("crane-").tempdir_in(&env.run_dir)?;
    if registry.username.is_some() {
        std::fs::write(config.path().join("config.json"), registry.dockerconfigjson())?;
    }
    let mut crane = Command::new(env.tools.join("crane"));
    crane.args(["validate", "--remote", &name]).stdin(Stdio::null());
    crane.env("DOCKER_CONFIG", config.path()).env("SSL_CERT_FILE", &env.ca_path);
    if !layers {
        crane.arg("--fast");
    }
    run(crane, &format!("crane validate {name}")).await
}

/// Lets `regctl image export` read all of an image, index or artifact; an error says what it finds wrong. It computes the
/// digest of every manifest and blob, and unpacks nothing.
pub async fn regctl_reads(env: &Env, registry: &Registry, repository: &str, reference: &str) -> Result<()> {
    let name = name(registry, repository, reference);
    let dir = tempfile::Builder::new().prefix("regctl-").tempdir_in(&env.run_dir)?;
    let (tls, certificate) = if registry.tls { ("enabled", env.ca_pem.as_str()) } else { ("disabled", "") };
    let host = json!({ "tls": tls, "regcert": certificate, "user": registry.username, "pass": registry.password });
    let config = json!({ "hosts": { &registry.host: host }, "incDockerCert": false, "incDockerCred": false });
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    let mut regctl = Command::new(env.tools.join("regctl"));
    regctl.args(["image", "export", &name]).arg(dir.path().join("image.tar")).stdin(Stdio::null());
    regctl.env("REGCTL_CONFIG", dir.path().join("config.json")).env("HOME", dir.path());
    run(regctl, &format!("regctl image export {name}")).await
}

fn name(registry: &Registry, repository: &str, reference: &str) -> String {
    let separator = if reference.contains(':') { '@' } else { ':' };
    format!("{}/{repository}{separator}{reference}", registry.host)
}

async fn run(command: Command, what: &str) -> Result<()> {
    let output = tokio::process::Command::from(command).kill_on_drop(true).output().await.context(what.to_owned())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what}: {}", said.trim());
    Ok(())
}
