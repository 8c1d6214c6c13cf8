//! `imagemirror operator`: flags and environment into one configuration, then the operator until a signal.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::{Failure, runtime, signals};
use crate::{
    config::Config,
    controller::{self, Options},
    telemetry::logging::{self, Format},
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The operator's configuration (YAML).
    #[arg(long, env = "IMAGEMIRROR_CONFIG")]
    config: Option<PathBuf>,
    /// The kubeconfig to use instead of the pod's ServiceAccount.
    #[arg(long, env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Where /livez, /readyz and /metrics are served.
    #[arg(long, env = "IMAGEMIRROR_LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// The namespace of the lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "imagemirror-system")]
    lease_namespace: String,
    /// The name of the lease.
    #[arg(long, env = "IMAGEMIRROR_LEASE_NAME", default_value = "imagemirror")]
    lease_name: String,
    /// The name of this replica in the lease.
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
}

pub(super) fn run(arguments: Arguments, format: Option<Format>, level: Option<String>) -> Result<(), Failure> {
    let usage = |error: &dyn std::fmt::Display| Failure::Usage(error.to_string());
    let config = Config::load(arguments.config.as_deref()).map_err(|error| usage(&error))?;
    let format = format.unwrap_or(config.log.format);
    let level = level.unwrap_or_else(|| config.log.level.clone());
    logging::init(format, &level).map_err(|error| usage(&error))?;
    runtime()?.block_on(async {
        let kubernetes = kubernetes(arguments.kubeconfig).await?;
        let identity = arguments.identity.unwrap_or_else(|| format!("imagemirror-{:08x}", fastrand::u32(..)));
        let options = Options {
            kubernetes,
            listen: arguments.listen,
            lease_namespace: arguments.lease_namespace,
            lease_name: arguments.lease_name,
            identity,
        };
        tracing::info!(version = env!("CARGO_PKG_VERSION"), identity = %options.identity, "starting");
        let result = controller::run(config, options, signals()).await;
        tracing::info!("stopped");
        result.map_err(|error| Failure::Failed(error.to_string()))
    })
}

async fn kubernetes(path: Option<PathBuf>) -> Result<kube::Config, Failure> {
    let Some(path) = path else {
        return kube::Config::infer().await.map_err(|error| {
            Failure::Usage(format!("no access to Kubernetes: {error}; name a file with --kubeconfig"))
        });
    };
    let fail = |error: &dyn std::fmt::Display| Failure::Usage(format!("the kubeconfig {}: {error}", path.display()));
    let kubeconfig = Kubeconfig::read_from(&path).map_err(|error| fail(&error))?;
    let options = KubeConfigOptions::default();
    kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| fail(&error))
}
