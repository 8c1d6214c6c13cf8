//! `kubectl imagemirror check NAME`: `check` for an object of the cluster, with the Secrets that it names.

use std::collections::BTreeMap;

use clap::Args;

use super::cluster::{Cluster, OfOperator};
use crate::{
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
    #[command(flatten)]
    of_operator: OfOperator,
}

pub(super) async fn run(cluster: &Cluster, arguments: &Arguments) -> Result<(), Failure> {
    let cancel = signals();
    let mirror = cluster.validated(&cluster.get(&arguments.name).await?)?;
    let secrets = cluster.secrets(&mirror, &arguments.of_operator).await?;
    let prepared = prepare(&mirror, &secrets, |_| Transport::default(), &BTreeMap::new());
    let found = check::of(&check::client(), prepared, &cancel).await.ok_or_else(Failure::nothing_changed)?;
    check::report(&[Outcome::new(&mirror, found)], arguments.output)
}
