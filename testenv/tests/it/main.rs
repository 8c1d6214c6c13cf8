//! Tests of the test environment itself, against real registries: `testenv up -- cargo test -p testenv`.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod forms;
mod forwarder;
mod lifecycle;
mod proxy;
mod registries;
mod rewrites;
mod tokens;
mod trap;
mod witness;

use std::time::Duration;

use testenv::proxy::{Exchange, Matcher, Proxy, Route};
use testenv::{Client, Env, Image};

const DEADLINE: Duration = Duration::from_secs(10);

/// A repository that no other test uses.
fn repository(test: &str) -> String {
    format!("testenv/{test}-{:08x}", fastrand::u32(..))
}

fn image() -> Image {
    Image::multi_arch(fastrand::u64(..), &[300, 70_000], &["linux/amd64", "linux/arm64"])
}

fn client(registry: &testenv::Registry) -> Client {
    Client::new(Env::get(), registry).unwrap()
}

fn blob_gets() -> Matcher {
    Matcher::new().method("GET").route(Route::Blob)
}

/// Whether an exchange of this method and route is over.
fn is_done(log: &[Exchange], method: &str, route: Route) -> bool {
    log.iter().any(|exchange| exchange.done && exchange.key.method == method && exchange.key.route == route)
}

/// An image at the source, and a proxy in front of it.
async fn source_with_image() -> (Proxy, String, Image) {
    let env = Env::get();
    let (repository, image) = (repository("proxy"), image());
    client(&env.source).push(&repository, "latest", &image).await.unwrap();
    let proxy = Proxy::to(env, &env.source).label("source").start().await.unwrap();
    (proxy, repository, image)
}

/// A client that follows redirects and logs in nowhere by itself.
fn raw() -> reqwest::Client {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let authority = reqwest::Certificate::from_pem(Env::get().ca_pem.as_bytes()).unwrap();
    reqwest::Client::builder().tls_certs_only([authority]).no_proxy().timeout(DEADLINE).build().unwrap()
}
