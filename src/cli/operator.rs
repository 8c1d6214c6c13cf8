//! `imagemirror operator`: flags and environment into one configuration, then the operator until a signal.

use std::{
    convert::Infallible,
    future::pending,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::{Failure, runtime, signals};
use crate::{
    config::Config,
    controller::{self, Options},
    telemetry::{
        follow::follow,
        logging::{self, Format, Level},
    },
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The operator's configuration (YAML).
    #[arg(long, env = "IMAGEMIRROR_CONFIG")]
    config: Option<PathBuf>,
    /// The kubeconfig to use instead of the pod's ServiceAccount.
    #[arg(long, env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Where /livez and /readyz are served, and /metrics unless it has TLS.
    #[arg(long, env = "IMAGEMIRROR_LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Where /metrics is served with TLS (`metrics.certFile` of the configuration).
    #[arg(long, env = "IMAGEMIRROR_METRICS_LISTEN", default_value = "0.0.0.0:8443")]
    metrics_listen: SocketAddr,
    /// The namespace of the lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "imagemirror-system")]
    lease_namespace: String,
    /// The name of the lease.
    #[arg(long, env = "IMAGEMIRROR_LEASE_NAME", default_value = "imagemirror")]
    lease_name: String,
    /// The name of this replica in the lease.
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
    /// The collector of traces; `/v1/traces` is added.
    #[cfg(feature = "otel")]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// The same as a whole URL, which comes first.
    #[cfg(feature = "otel")]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")]
    otlp_traces_endpoint: Option<String>,
}

#[cfg(feature = "otel")]
impl Arguments {
    /// Where traces go, if anywhere: a variable that is empty is as one that is not set.
    fn collector(&self) -> Option<String> {
        let is_set = |endpoint: &&String| !endpoint.is_empty();
        let base = self.otlp_endpoint.as_ref().filter(is_set).map(|base| base.trim_end_matches('/'));
        let whole = self.otlp_traces_endpoint.as_ref().filter(is_set).cloned();
        whole.or_else(|| base.map(|base| format!("{base}/v1/traces")))
    }
}

pub(super) fn run(arguments: Arguments, format: Option<Format>, level: Option<String>) -> Result<(), Failure> {
    let usage = |error: &dyn std::fmt::Display| Failure::Usage(error.to_string());
    let config = Config::load(arguments.config.as_deref()).map_err(|error| usage(&error))?;
    let format = format.unwrap_or(config.log.format);
    // A level that is a flag is not changed by the file.
    let followed = arguments.config.clone().filter(|_| level.is_none());
    let level = level.unwrap_or_else(|| config.log.level.clone());
    let runtime = runtime()?;
    #[cfg(not(feature = "otel"))]
    let further = None;
    #[cfg(feature = "otel")]
    let (traces, further) = match arguments.collector() {
        Some(collector) => {
            let started = crate::telemetry::traces::Traces::start(&collector, runtime.handle().clone());
            let (traces, further) = started.map_err(|error| usage(&error))?;
            (Some(traces), further)
        }
        None => (None, None),
    };
    let logged = logging::init(format, &level, further).map_err(|error| usage(&error))?;
    let result = runtime.block_on(async {
        let kubernetes = kubernetes(arguments.kubeconfig).await?;
        let identity = arguments.identity.unwrap_or_else(|| format!("imagemirror-{:08x}", fastrand::u32(..)));
        let options = Options {
            kubernetes,
            listen: arguments.listen,
            metrics_listen: arguments.metrics_listen,
            lease_namespace: arguments.lease_namespace,
            lease_name: arguments.lease_name,
            identity,
        };
        tracing::info!(version = env!("CARGO_PKG_VERSION"), identity = %options.identity, "starting");
        let every = config.timing.config_poll;
        let result = tokio::select! {
            result = controller::run(config, options, signals()) => result,
            never = follow_level(followed, every, &logged) => match never {},
        };
        tracing::info!("stopped");
        result.map_err(|error| Failure::Failed(error.to_string()))
    });
    #[cfg(feature = "otel")]
    if let Some(traces) = traces {
        traces.end();
    }
    result
}

/// Logs what the configuration says, also when it says something else than at the start.
async fn follow_level(path: Option<PathBuf>, every: Duration, logged: &Level) -> Infallible {
    let Some(path) = path else { return pending().await };
    let mut last = None;
    follow([path.clone()], every, |[text]| {
        let level = Config::parse(&String::from_utf8_lossy(&text), &path).map(|config| config.log.level);
        match level {
            Ok(level) if last.as_ref() == Some(&level) => {}
            Ok(level) => match logged.set(&level) {
                Ok(()) => {
                    if last.is_some() {
                        tracing::info!(level, "the log level has changed");
                    }
                    last = Some(level);
                }
                Err(error) => tracing::warn!(%error, "the log level stays as it is"),
            },
            Err(error) => tracing::warn!(%error, "the configuration is wrong now: the log level stays as it is"),
        }
    })
    .await
}

/// Whether a kubeconfig is there, said in better words than the client's.
pub(super) fn can_be_read(kubeconfig: &Path) -> Result<(), Failure> {
    let opened = std::fs::File::open(kubeconfig).map(|_| ());
    opened.map_err(|error| {
        let what = format!("the kubeconfig {} cannot be read: {error}", kubeconfig.display());
        Failure::Usage(format!("{what}; name another with --kubeconfig"))
    })
}

async fn kubernetes(path: Option<PathBuf>) -> Result<kube::Config, Failure> {
    let Some(path) = path else {
        return kube::Config::infer().await.map_err(|error| {
            Failure::Usage(format!("no access to Kubernetes: {error}; name a file with --kubeconfig"))
        });
    };
    let fail = |error: &dyn std::fmt::Display| {
        Failure::Usage(format!(
            "the kubeconfig {} cannot be used: {error}; name another with --kubeconfig",
            path.display()
        ))
    };
    can_be_read(&path)?;
    let kubeconfig = Kubeconfig::read_from(&path).map_err(|error| fail(&error))?;
    let options = KubeConfigOptions::default();
    kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| fail(&error))
}
