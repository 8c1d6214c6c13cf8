//! `kubectl imagemirror list`: one line for each object.

use clap::Args;
use jiff::Timestamp;
use kube::{ResourceExt as _, api::ListParams};

use super::{
    cluster::Cluster,
    table::{age, condition, table},
};
use crate::{
    api::v1alpha1::ImageMirror,
    cli::{Failure, Output, print_json, say},
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Those of all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Those with these labels.
    #[arg(short = 'l', long, value_name = "LABELS")]
    selector: Option<String>,
    /// How the list is written.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub(super) async fn run(cluster: &Cluster, arguments: &Arguments) -> Result<(), Failure> {
    let api = if arguments.all_namespaces { cluster.all_mirrors() } else { cluster.mirrors() };
    let params = ListParams { label_selector: arguments.selector.clone(), ..ListParams::default() };
    let mirrors = cluster.ask("ImageMirrors cannot be listed", api.list(&params)).await?.items;
    match arguments.output {
        Output::Json => print_json(&serde_json::json!({ "items": mirrors })),
        Output::Text if mirrors.is_empty() => {
            let place = if arguments.all_namespaces { "any namespace" } else { &cluster.namespace };
            eprintln!("there is no ImageMirror in {place}");
            Ok(())
        }
        Output::Text => {
            say(&text(&mirrors, arguments.all_namespaces, Timestamp::now()));
            Ok(())
        }
    }
}

fn text(mirrors: &[ImageMirror], with_namespace: bool, now: Timestamp) -> String {
    let rows: Vec<[String; 8]> = mirrors.iter().map(|mirror| row(mirror, with_namespace, now)).collect();
    table(["NAME", "READY", "REASON", "SYNCED", "FAILED", "TARGET", "LAST SYNC", "AGE"], &rows)
}

fn row(mirror: &ImageMirror, with_namespace: bool, now: Timestamp) -> [String; 8] {
    let name = mirror.name_any();
    let name = if with_namespace { format!("{}/{name}", mirror.namespace().unwrap_or_default()) } else { name };
    let ready = condition(mirror, "Ready");
    let status = mirror.status.as_ref();
    let is_suspended = mirror.spec.suspend.unwrap_or_default();
    let reason = ready.map(|ready| ready.reason.clone()).unwrap_or_default();
    [
        name,
        ready.map_or_else(|| "Unknown".to_owned(), |ready| ready.status.clone()),
        if is_suspended { "Suspended".to_owned() } else { reason },
        status.and_then(|status| status.synced.clone()).unwrap_or_default(),
        status.and_then(|status| status.summary).map(|summary| summary.failed.to_string()).unwrap_or_default(),
        mirror.spec.target.registry.clone(),
        age(status.and_then(|status| status.last_sync.as_ref()).map(|last| &last.finished_at), now),
        age(mirror.metadata.creation_timestamp.as_ref(), now),
    ]
}
