//! A fault at every request: one clean run is recorded, then for each of its requests and each way to break it a copy
//! into an empty repository must still end well, without a manifest ever put before its children.
//!
//! Cases run side by side in this process, each with proxies and repositories of its own.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, stream};
use imagemirror::{
    auth::CredentialStore,
    copy::{CopyOptions, Fence, Progress},
    registry::{Access, Client, ClientOptions, Timing, Transport},
    sync::{Destination, ImageRequest, Registries, Sources, SyncReport, SyncRequest, sync},
};
use testenv::{
    Env, Registry,
    images::Image,
    proxy::{Action, Close, Matcher, Proxy},
};
use tokio_util::sync::CancellationToken;

/// Cases that run side by side.
const AT_ONCE: usize = 8;

pub(crate) fn access(env: &Env, registry: &Registry) -> Result<Access> {
    let credentials = match registry.username {
        Some(_) => CredentialStore::from_docker_config_json(registry.dockerconfigjson().as_bytes(), "the test")?,
        None => CredentialStore::default(),
    };
    let ca = Some(env.ca_pem.clone().into_bytes().into());
    let transport = Transport { plain_http: !registry.tls, ca, ..Transport::default() };
    Ok(Access { host: registry.host.parse()?, transport, credentials })
}

pub(crate) fn client() -> Client {
    let timing = Timing {
        head: Duration::from_secs(2),
        idle: Duration::from_secs(2),
        answer: Duration::from_secs(2),
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(20),
        rate_pause: Duration::from_millis(20),
        ..Timing::default()
    };
    Client::new(ClientOptions { timing, ..ClientOptions::default() })
}

/// One copy of `repository:1` into `to:1`.
pub(crate) async fn copy(
    env: &Env,
    source: &Registry,
    target: &Registry,
    repository: &str,
    to: &str,
) -> Result<SyncReport> {
    let (from, into) = (access(env, source)?, access(env, target)?);
    let image = ImageRequest {
        source: format!("{}/{repository}:1", source.host).parse::<imagemirror::oci::Reference>()?.into(),
        target_repository: to.parse()?,
        target_tag: "1".parse()?,
        platforms: Vec::new(),
        last: None,
        blocked: None,
    };
    let request = SyncRequest {
        images: vec![image],
        timeout: Duration::from_mins(1),
        options: CopyOptions::default(),
        looks_at_attached: true,
    };
    let registries = Registries {
        sources: Sources::Registries([(from.host.clone(), from)].into()),
        target: Destination::Registry(into),
    };
    let cancel = CancellationToken::new();
    let report = sync(&client(), &request, &registries, Fence::Open, Arc::new(Progress::default()), &cancel).await;
    report.context("cancelled")
}

/// What identifies a request in every run alike.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    is_source: bool,
    method: String,
    path: String,
    nth: u32,
}

struct Proxies {
    source: Proxy,
    target: Proxy,
}

impl Proxies {
    async fn start(env: &Env) -> Result<Self> {
        let source = Proxy::to(env, &env.source).label("source").start().await?;
        let target = Proxy::to(env, &env.target).label("target").start().await?;
        Ok(Self { source, target })
    }

    /// The part of a path that is the same whatever the repository is called and the session is.
    fn places(&self, to: &str) -> BTreeSet<Place> {
        let place = |is_source, exchange: &testenv::proxy::Exchange| {
            let path = exchange.path.replace(to, "TARGET");
            // Locations of sessions are never the same twice; the digest at their end is.
            let path = match path.split_once("/uploads/") {
                Some((before, after)) if !after.is_empty() && !after.starts_with('?') => {
                    format!("{before}/uploads/…{}", after.rsplit_once("digest=").map_or("", |(_, digest)| digest))
                }
                _ => path,
            };
            Place { is_source, method: exchange.key.method.to_string(), path, nth: exchange.key.nth }
        };
        let source = self.source.requests().into_iter().map(|exchange| place(true, &exchange));
        let target = self.target.requests().into_iter().map(|exchange| place(false, &exchange));
        source.chain(target).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_at_any_request_does_not_stop_the_copy() -> Result<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let env = Env::get();
    let prefix = format!("faults-{:06x}", fastrand::u32(..0x100_0000));
    let repository = format!("{prefix}/agent");
    let image = Image::multi_arch(201, &[1_200_000, 3_000], &["linux/amd64", "linux/arm64"]);
    testenv::Client::new(env, &env.source)?.push(&repository, "1", &image).await?;

    let clean = Proxies::start(env).await?;
    let to = format!("{prefix}/clean");
    let report = copy(env, clean.source.registry(), clean.target.registry(), &repository, &to).await?;
    ensure!(report.failed().next().is_none(), "{report:?}");
    let places = clean.places(&to);
    ensure!(places.len() >= 20, "only {places:?}");

    let faults = [
        Action::CloseBefore(Close::Fin),
        Action::CloseBefore(Close::Reset),
        Action::CloseAfterAnswer(Close::Fin),
        Action::CloseAfterAnswer(Close::Reset),
        Action::CutResponseBody { after: 1, close: Close::Fin },
        Action::CutResponseBody { after: 1000, close: Close::Reset },
        Action::CutRequestBody { after: 1000, close: Close::Reset },
        Action::respond(500),
        Action::respond(503).header("Retry-After", "0"),
        Action::respond(429).header("Retry-After", "0"),
    ];
    let mut cases = Vec::new();
    for place in &places {
        for fault in &faults {
            cases.push((cases.len(), place.clone(), fault.clone()));
        }
    }
    let total = cases.len();
    let outcomes = stream::iter(cases)
        .map(|(number, place, fault)| {
            let (repository, image, prefix) = (repository.clone(), image.clone(), prefix.clone());
            async move {
                let what = format!("{fault:?} at {place:?}");
                let to = format!("{prefix}/case-{number}");
                let case = one_fault(env, &repository, &to, &image, &place, fault);
                let outcome = tokio::time::timeout(crate::support::PATIENCE, case).await;
                outcome.context("it hangs").and_then(|outcome| outcome).context(what)
            }
        })
        .buffer_unordered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    let failed: Vec<String> = outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(failed.is_empty(), "{} of {total} cases failed:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

async fn one_fault(env: &Env, repository: &str, to: &str, image: &Image, place: &Place, fault: Action) -> Result<()> {
    let proxies = Proxies::start(env).await?;
    let proxy = if place.is_source { &proxies.source } else { &proxies.target };
    // The last part of a path tells requests apart; sessions by the digest that closes them.
    let part =
        place.path.rsplit_once('…').map_or_else(|| place.path.replace("TARGET", to), |(_, digest)| digest.to_owned());
    let matcher = Matcher::new().method(&place.method).path_contains(&part).skip(place.nth.saturating_sub(1)).times(1);
    proxy.rule(matcher, fault);
    let report = copy(env, proxies.source.registry(), proxies.target.registry(), repository, to).await?;
    if let Some((_, failure)) = report.failed().next() {
        anyhow::bail!("{}: {}", failure.reason, failure.message);
    }
    let violations = proxies.target.violations();
    ensure!(violations.is_empty(), "{violations:?}");
    ensure!(testenv::Client::new(env, &env.target)?.holds(to, "1", image).await?, "the target does not hold the image");
    Ok(())
}
