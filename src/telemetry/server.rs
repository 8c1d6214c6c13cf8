//! Probes and metrics over HTTP: `/livez`, `/readyz` with a line for each thing that is waited for, `/metrics`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What must be open before the operator is ready. Cheap to clone; all clones are the same gates.
#[derive(Clone)]
pub struct Gates {
    waiting: Arc<Mutex<BTreeMap<&'static str, Option<String>>>>,
}

impl Gates {
    /// Gates that are all closed.
    #[must_use]
    pub fn new(names: &[&'static str]) -> Self {
        let closed = names.iter().map(|name| (*name, Some("the operator to start".to_owned())));
        Self { waiting: Arc::new(Mutex::new(closed.collect())) }
    }

    /// It is there.
    pub fn open(&self, name: &'static str) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(name, None);
    }

    /// It is waited for; `what` follows the words "waiting for".
    pub fn close(&self, name: &'static str, what: &str) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(name, Some(what.to_owned()));
    }

    fn report(&self) -> (bool, String) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        for (name, what) in &*waiting {
            // Writing to a String does not fail.
            let _ = match what {
                None => writeln!(text, "{name}: ready"),
                Some(what) => writeln!(text, "{name}: waiting for {what}"),
            };
        }
        (waiting.values().all(Option::is_none), text)
    }
}

/// Serves until `shutdown`.
pub async fn serve(
    listener: TcpListener,
    gates: Gates,
    registry: Arc<Registry>,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let ready = move || async move {
        let (is_ready, text) = gates.report();
        (if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
    };
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(move || async move { metrics(&registry) }));
    axum::serve(listener, router).with_graceful_shutdown(async move { shutdown.cancelled().await }).await
}

fn metrics(registry: &Registry) -> Response {
    let mut text = String::new();
    if encode(&mut text, registry).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_is_ready_when_every_gate_is_open() {
        let gates = Gates::new(&["crd", "lease"]);
        gates.open("crd");
        gates.close("lease", "an answer");
        assert_eq!(gates.report(), (false, "crd: ready\nlease: waiting for an answer\n".to_owned()));
        gates.open("lease");
        assert!(gates.report().0);
    }
}
