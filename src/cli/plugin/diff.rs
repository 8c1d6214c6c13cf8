//! `kubectl imagemirror diff NAME`: `plan` for an object of the cluster, knowing what its status says of earlier runs.

use clap::Args;

use super::cluster::{Cluster, OfOperator};
use crate::{
    cli::{Failure, Output, mirrors::Outcome, plan, signals},
    mirror::{last_digests, prepare},
    registry::{Client, ClientOptions, Transport},
    sync::{choose, preview},
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The ImageMirror.
    name: String,
    /// How the plan is written.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    of_operator: OfOperator,
}

pub(super) async fn run(cluster: &Cluster, arguments: &Arguments) -> Result<(), Failure> {
    let cancel = signals();
    let found = cluster.get(&arguments.name).await?;
    let mirror = cluster.validated(&found)?;
    let secrets = cluster.secrets(&mirror, &arguments.of_operator).await?;
    let last = last_digests(&mirror, &found.status.unwrap_or_default());
    let prepared = prepare(&mirror, &secrets, |_| Transport::default(), &last);
    let (client, registries) = (Client::new(ClientOptions::default()), prepared.registries);
    let request = choose(&client, prepared.request, &prepared.selections, &registries, &cancel).await;
    let request = request.ok_or_else(Failure::nothing_changed)?;
    let report = preview(&client, &request, &registries, &cancel).await.ok_or_else(Failure::nothing_changed)?;
    plan::report(&[Outcome::new(&mirror, report)], arguments.output)
}
