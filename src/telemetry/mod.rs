//! What is seen of the operator from outside: logs, metrics, probes.

pub mod follow;
pub mod logging;
pub mod metrics;
pub mod server;
pub mod tls;
#[cfg(feature = "otel")]
pub mod traces;
