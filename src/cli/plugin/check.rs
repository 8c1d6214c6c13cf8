//! `kubectl imagemirror check NAME`: `check` for an object of the cluster, with the Secrets that it names.

use std::collections::BTreeMap;

use clap::Args;

use super::cluster::Cluster;
use crate::{
    auth::cloud::GcpTrust,
    cli::{Failure, Output, check, mirrors::Outcome, signals},
    mirror::prepare,
    registry::Transport,
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The ImageMirror.
    name: String,
    /// How the report is written.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// By what Google knows the cluster: gcp.workloadIdentity of the operator's configuration.
    #[arg(long, value_name = "RESOURCE")]
    gcp_workload_identity: Option<GcpTrust>,
}

pub(super) async fn run(cluster: &Cluster, arguments: &Arguments) -> Result<(), Failure> {
    let cancel = signals();
    let mirror = cluster.validated(&cluster.get(&arguments.name).await?)?;
    let secrets = cluster.secrets(&mirror, arguments.gcp_workload_identity.clone()).await?;
    let prepared = prepare(&mirror, &secrets, |_| Transport::default(), &BTreeMap::new());
    let found = check::of(&check::client(), prepared, &cancel).await.ok_or_else(Failure::nothing_changed)?;
    check::report(&[Outcome::new(&mirror, found)], arguments.output)
}
