//! Tests of the test environment itself, against real registries: `testenv up -- cargo test -p testenv`.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod forwarder;
mod lifecycle;
mod proxy;
mod registries;

use testenv::proxy::{Exchange, Matcher, Route};
use testenv::{Client, Env, Image};

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
