//! `kubectl imagemirror suspend|resume NAME…`: `spec.suspend`.

use clap::Args;
use serde_json::{Value, json};

use super::cluster::Cluster;
use crate::cli::{Failure, say};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The ImageMirrors.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

pub(super) async fn run(cluster: &Cluster, arguments: &Arguments, suspend: bool) -> Result<(), Failure> {
    for name in &arguments.names {
        let was = cluster.get(name).await?.spec.suspend.unwrap_or_default();
        let said = match (was, suspend) {
            (true, true) => "is suspended already",
            (false, false) => "is not suspended",
            (_, true) => "is suspended",
            (_, false) => "is resumed",
        };
        if was != suspend {
            // Away is as it was before it was suspended.
            let value = if suspend { Value::Bool(true) } else { Value::Null };
            cluster.patch(name, &json!({"spec": {"suspend": value}})).await?;
        }
        say(&format!("{}/{name} {said}\n", cluster.namespace));
    }
    Ok(())
}
