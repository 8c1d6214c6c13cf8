//! Registries: CNCF distribution with the options that tests need, its older version 2.8, olareg (referrers API, rate
//! limits) and crane's in-memory registry, an independent third implementation. [`Registry`] is what a client knows of
//! one; [`RegistryServer`] is one that this process started.
//!
//! A test starts one of its own with `RegistryServer::start(env, RegistryOptions { kind, tls, .. }).await`, and it is gone
//! when that is dropped:
//!
//! | [`Kind`] | TLS | [`Auth`] | storage | configured with |
//! |---|---|---|---|---|
//! | `Distribution` | yes | htpasswd, token | memory, disk | `extra`, merged into its configuration |
//! | `Distribution2` | yes | htpasswd | memory, disk | `extra` |
//! | `Olareg` | yes | htpasswd, opaque | memory, disk | `args`: `--rate-limit`, `--warning`, `--api-referrer=false` |
//! | `Crane` | no | none | memory | |

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::certs::{Ca, http_client};
use crate::controlplane::free_port;
use crate::env::{Env, log_path};
use crate::process::Process;
use crate::tools::Tools;

const DEADLINE: Duration = Duration::from_secs(30);

/// What a client knows of a registry.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Registry {
    /// `127.0.0.1:PORT`
    pub host: String,
    pub tls: bool,
    pub username: Option<String>,
    pub password: Option<String>,
    /// Of the server, with one line for each request where the server writes them (distribution does).
    pub log: PathBuf,
}

/// One line of the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub method: String,
    /// With the query.
    pub path: String,
    pub status: u16,
    pub user_agent: String,
}

impl Registry {
    /// `https://127.0.0.1:PORT`, or `http`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.host)
    }

    #[must_use]
    pub fn with_credentials(&self, username: &str, password: &str) -> Self {
        Self { username: Some(username.to_owned()), password: Some(password.to_owned()), ..self.clone() }
    }

    #[must_use]
    pub fn anonymous(&self) -> Self {
        Self { username: None, password: None, ..self.clone() }
    }

    /// The same registry at another address, such as that of a proxy in front of it.
    #[must_use]
    pub fn at(&self, host: &str) -> Self {
        Self { host: host.to_owned(), ..self.clone() }
    }

    /// The content of a pull secret for this registry.
    #[must_use]
    pub fn dockerconfigjson(&self) -> String {
        let username = self.username.as_deref().unwrap_or_default();
        let password = self.password.as_deref().unwrap_or_default();
        let auth = BASE64_STANDARD.encode(format!("{username}:{password}"));
        json!({ "auths": { &self.host: { "auth": auth } } }).to_string()
    }

    /// All requests the server has answered so far, oldest first. Only distribution writes them, old and new.
    pub fn access_log(&self) -> Result<Vec<Access>> {
        let text = std::fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))?;
        Ok(text.lines().filter_map(Access::parse).collect())
    }
}

impl Access {
    /// Parses a line of Apache's combined format; anything else in the log is none.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        // host - user [time] "METHOD PATH HTTP/1.1" STATUS SIZE "referer" "user agent"
        let mut quoted = line.split('"');
        let _client = quoted.next()?;
        let mut request = quoted.next()?.split(' ');
        let (method, path, version) = (request.next()?, request.next()?, request.next()?);
        if !version.starts_with("HTTP/") {
            return None;
        }
        let status = quoted.next()?.split_whitespace().next()?.parse().ok()?;
        let user_agent = quoted.nth(2).unwrap_or_default().to_owned();
        Some(Self { method: method.to_owned(), path: path.to_owned(), status, user_agent })
    }
}

/// Which program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    Distribution,
    /// Docker's registry 2.8: no referrers API and other errors. Not with [`Auth::Token`].
    Distribution2,
    Olareg,
    /// Accepts manifests whose blobs are missing: no judge of integrity. Neither TLS nor authentication.
    Crane,
}

/// How clients log in.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    #[default]
    None,
    /// Names and passwords.
    Htpasswd(Vec<(String, String)>),
    /// Names and passwords, at a token server of olareg's own whose tokens are opaque and grant by user, not by scope.
    Opaque(Vec<(String, String)>),
    Token {
        realm: String,
        service: String,
        issuer: String,
        /// The key set that verifies tokens, JSON.
        jwks: String,
    },
}

/// What to start. The default is distribution with TLS, no authentication, storage in memory.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// In the name of the log.
    pub name: String,
    pub kind: Kind,
    pub tls: bool,
    pub auth: Auth,
    /// Storage in a fresh directory of the run instead of memory; not for crane.
    pub disk: bool,
    /// Merged into distribution's configuration, object by object.
    pub extra: Value,
    /// Further arguments for olareg or crane.
    pub args: Vec<String>,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            name: "registry".to_owned(),
            kind: Kind::Distribution,
            tls: true,
            auth: Auth::None,
            disk: false,
            extra: Value::Null,
            args: Vec::new(),
        }
    }
}

/// A registry that this process runs; dropping it kills it.
pub struct RegistryServer {
    registry: Registry,
    dir: PathBuf,
    process: Process,
}

impl RegistryServer {
    /// Starts a registry for a test and waits until it answers.
    pub async fn start(env: &Env, options: RegistryOptions) -> Result<Self> {
        let tools = Tools { dir: env.tools.clone() };
        Self::start_in(&tools, &env.run_dir, &env.ca()?, options).await
    }

    /// Starts a registry without an environment around it, as part of the run that `run_dir` is the directory of.
    pub async fn start_in(tools: &Tools, run_dir: &Path, ca: &Ca, options: RegistryOptions) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(&format!("{}-", options.name))
            .tempdir_in(run_dir)
            .context("make the registry's directory")?
            .keep();
        ca.server()?.save(&dir.join("tls.pem"), &dir.join("tls.key"))?;
        let log = log_path(run_dir, &options.name);
        let mut command;
        // Distribution says which port it got; for the others it must be chosen.
        let mut port = None;
        match options.kind {
            Kind::Distribution | Kind::Distribution2 => {
                let is_old = options.kind == Kind::Distribution2;
                match &options.auth {
                    Auth::Token { .. } if is_old => bail!("distribution 2.8 takes no key set for tokens"),
                    Auth::Opaque(_) => bail!("opaque tokens are olareg's"),
                    _ => {}
                }
                let config = distribution_config(&dir, &options)?;
                std::fs::write(dir.join("config.yml"), format!("{config:#}"))?;
                command = Command::new(tools.path(if is_old { "registry2" } else { "registry" }));
                command.arg("serve").arg(dir.join("config.yml"));
                // No variable of the caller's may change the configuration.
                for (name, _) in std::env::vars_os() {
                    if name.to_string_lossy().starts_with("REGISTRY_") {
                        command.env_remove(name);
                    }
                }
                command.env("OTEL_TRACES_EXPORTER", "none");
            }
            Kind::Olareg => {
                let chosen = *port.insert(free_port()?);
                command = Command::new(tools.path("olareg"));
                olareg_arguments(&mut command, &dir, &options, chosen)?;
            }
            Kind::Crane => {
                if options.tls || !matches!(options.auth, Auth::None) {
                    bail!("crane's registry has neither TLS nor authentication");
                }
                let chosen = *port.insert(free_port()?);
                command = Command::new(tools.path("crane"));
                command.args(["registry", "serve", "--address", &format!("127.0.0.1:{chosen}")]);
            }
        }
        command.args(&options.args).current_dir(&dir);
        let mut process = Process::spawn_part(&options.name, command, &log)?;
        let port = match port {
            Some(port) => port,
            None => process.until_ready(DEADLINE, async || listening_port(&log)).await?,
        };
        let (username, password) = match &options.auth {
            Auth::Htpasswd(users) | Auth::Opaque(users) => users.first().cloned().unzip(),
            Auth::None | Auth::Token { .. } => (None, None),
        };
        let registry = Registry { host: format!("127.0.0.1:{port}"), tls: options.tls, username, password, log };
        let client = http_client(ca.cert_pem(), None)?;
        let ping = format!("{}/v2/", registry.url());
        process.until_ready(DEADLINE, async || client.get(&ping).send().await.ok()).await?;
        Ok(Self { registry, dir, process })
    }

    /// With the first user's credentials, if there are any.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    #[must_use]
    pub fn host(&self) -> &str {
        &self.registry.host
    }

    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Other names and passwords from now on, for a distribution that was started with some.
    pub fn set_users(&self, users: &[(String, String)]) -> Result<()> {
        htpasswd(&self.dir, users).map(|_| ())
    }

    pub async fn stop(self) -> Result<()> {
        self.process.kill().await
    }
}

fn distribution_config(dir: &Path, options: &RegistryOptions) -> Result<Value> {
    let storage = if options.disk {
        json!({ "filesystem": { "rootdirectory": dir.join("storage") } })
    } else {
        json!({ "inmemory": {} })
    };
    let mut config = json!({
        "version": "0.1",
        "log": { "level": "info", "accesslog": { "disabled": false } },
        "storage": storage,
        "http": { "addr": "127.0.0.1:0", "secret": "testenv" },
    });
    merge(
        &mut config,
        &json!({ "storage": {
        "delete": { "enabled": true },
        "maintenance": { "uploadpurging": { "enabled": false } },
    } }),
    );
    if options.tls {
        let tls = json!({ "certificate": dir.join("tls.pem"), "key": dir.join("tls.key") });
        merge(&mut config, &json!({ "http": { "tls": tls } }));
    }
    match &options.auth {
        Auth::None | Auth::Opaque(_) => {}
        Auth::Htpasswd(users) => {
            let path = htpasswd(dir, users)?;
            merge(&mut config, &json!({ "auth": { "htpasswd": { "realm": "testenv", "path": path } } }));
        }
        Auth::Token { realm, service, issuer, jwks } => {
            let path = dir.join("jwks.json");
            std::fs::write(&path, jwks)?;
            let token = json!({ "realm": realm, "service": service, "issuer": issuer, "jwks": path });
            merge(&mut config, &json!({ "auth": { "token": token } }));
        }
    }
    merge(&mut config, &options.extra);
    Ok(config)
}

fn olareg_arguments(command: &mut Command, dir: &Path, options: &RegistryOptions, port: u16) -> Result<()> {
    command.args(["serve", "--addr", "127.0.0.1", "--port", &port.to_string(), "--verbosity", "info"]);
    command.args(["--api-delete", "--api-blob-delete", "--api-referrer", "--gc-frequency", "-1s"]);
    if options.disk {
        command.arg("--dir").arg(dir.join("storage"));
    } else {
        command.args(["--store-type", "mem"]);
    }
    if options.tls {
        command.arg("--tls-cert").arg(dir.join("tls.pem")).arg("--tls-key").arg(dir.join("tls.key"));
    }
    match &options.auth {
        Auth::None => {}
        Auth::Htpasswd(users) => {
            command.arg("--auth-basic").arg(olareg_users(dir, users)?);
        }
        Auth::Opaque(users) => {
            let scheme = if options.tls { "https" } else { "http" };
            command.args(["--external-url", &format!("{scheme}://127.0.0.1:{port}")]);
            command.arg("--auth-token-opaque").arg(olareg_users(dir, users)?);
        }
        Auth::Token { .. } => bail!("olareg takes no key set for tokens"),
    }
    Ok(())
}

/// Everybody may do everything.
fn olareg_users(dir: &Path, users: &[(String, String)]) -> Result<PathBuf> {
    let mut entries = serde_json::Map::new();
    for (name, password) in users {
        entries.insert(name.clone(), json!({ "cred": bcrypt::hash(password, 4)? }));
    }
    let names: Vec<&String> = users.iter().map(|(name, _)| name).collect();
    // The empty name is that of `/v2/`.
    let acls = ["*", ""].map(|repository| json!({ "repo": repository, "members": names, "access": ["*"] }));
    let config = json!({ "users": entries, "acls": acls });
    let path = dir.join("users.yaml");
    std::fs::write(&path, config.to_string())?;
    Ok(path)
}

/// bcrypt at its lowest cost: distribution accepts nothing else, and checks it at every request.
fn htpasswd(dir: &Path, users: &[(String, String)]) -> Result<PathBuf> {
    let mut lines = Vec::new();
    for (name, password) in users {
        lines.push(format!("{name}:{}\n", bcrypt::hash(password, 4)?));
    }
    let path = dir.join("htpasswd");
    std::fs::write(&path, lines.concat())?;
    Ok(path)
}

fn listening_port(log: &Path) -> Option<u16> {
    let text = std::fs::read_to_string(log).ok()?;
    let (_, after) = text.split_once("listening on 127.0.0.1:")?;
    let digits = after.split(|c: char| !c.is_ascii_digit()).next()?;
    // Not a part of the line: the port must be followed by something.
    if after.len() == digits.len() { None } else { digits.parse().ok() }
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (_, Value::Null) => {}
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_log_line_is_parsed_and_others_are_not() {
        let line =
            r#"127.0.0.1 - - [21/Nov/2026:10:00:00 +0000] "GET /v2/a/tags/list?n=1 HTTP/1.1" 404 52 "" "x/1 (y)""#;
        let access = Access::parse(line).unwrap();
        assert_eq!((access.method.as_str(), access.path.as_str()), ("GET", "/v2/a/tags/list?n=1"));
        assert_eq!((access.status, access.user_agent.as_str()), (404, "x/1 (y)"));
        assert_eq!(Access::parse(r#"time="2026" level=info msg="response completed" a.b="c""#), None);
    }

    #[test]
    fn merging_keeps_what_is_not_named() {
        let mut config = json!({ "a": { "b": 1, "c": 2 } });
        merge(&mut config, &json!({ "a": { "c": 3 }, "d": 4 }));
        assert_eq!(config, json!({ "a": { "b": 1, "c": 3 }, "d": 4 }));
    }
}
