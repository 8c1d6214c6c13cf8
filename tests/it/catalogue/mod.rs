//! The fault catalogue as a table: what registries, networks and attackers do, and what must be seen then. Every row is
//! a copy with proxies and a repository of its own; all rows run side by side and one run shows every failure.
//!
//! The ids are those of the catalogue of faults (R1 to R38) and of the threat model (T1 to T17); `Q` is a quirk that a
//! registry is known for.

mod auth;
mod bench;
mod downloads;
mod leaks;
mod listener;
mod quirks;
mod threats;
mod uploads;
mod whole;

use std::{collections::HashSet, sync::Arc};

use anyhow::{Result, ensure};

use self::bench::{Bench, Row, World};

/// Rows that fail because of the product. One that passes must leave the list.
const KNOWN_GAPS: &[&str] = &[
    "R2-416",
    "R3-chunked-large",
    "R3-chunked-large-once",
    "R3-chunked-small",
    "R3-chunked-small-once",
    "R4-chunked-large",
    "R4-chunked-large-once",
    "R4-chunked-small",
    "R4-chunked-small-once",
    "R5-manifest-once",
    "R6-tag-once",
    "R10-404",
    "R10-404-source",
    "R10-404-source-old",
    "R10-redirect",
    "R14-write-307",
    "R16-404-always",
    "R16-404-bare-always",
    "R22-other-code-always",
    "R23-403",
    "R23-405",
    "R23-409",
    "R23-409-denied",
    "R23-ecr",
    "R24-405",
    "R25-cancel",
    "R25-no-space",
    "R30-target-child",
    "R30-target-head",
    "R30-target-put",
    "R30-target-tag",
    "R30-target-tag-old",
    "T2-challenge-token",
    "T4-layer",
    "T4-refused",
    "T15-size-max",
    "T15-token",
    "Q-chunked",
    "Q-mount-202",
    "Q-mount-400",
    "Q-mount-401",
    "Q-mount-403",
    "Q-mount-404",
    "Q-mount-405",
    "Q-range-none",
    "Q-range-part",
    "Q-range-start",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_of_the_catalogue_ends_as_it_should() -> Result<()> {
    let world = Arc::new(World::start().await?);
    let tables = [
        downloads::rows(),
        uploads::rows(),
        auth::rows(),
        whole::rows(),
        leaks::rows(),
        threats::rows(),
        quirks::rows(),
    ];
    let rows: Vec<Row> = tables.into_iter().flatten().collect();
    let ids: HashSet<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    ensure!(ids.len() == rows.len(), "an id is there twice");
    let unknown: Vec<_> = KNOWN_GAPS.iter().filter(|gap| !ids.contains(**gap)).collect();
    ensure!(unknown.is_empty(), "no rows: {unknown:?}");
    let cases: Vec<_> = rows.into_iter().enumerate().map(|(number, row)| case(&world, number, row)).collect();
    crate::cases::side_by_side(cases).await
}

fn case(world: &Arc<World>, number: usize, row: Row) -> (String, impl Future<Output = Result<()>>) {
    let world = Arc::clone(world);
    let is_gap = KNOWN_GAPS.contains(&row.id.as_str());
    let what = format!("{}: {}", row.id, row.what);
    let run = async move {
        let outcome = (row.run)(Bench::new(world, number).await?).await;
        if !is_gap {
            return outcome;
        }
        ensure!(outcome.is_err(), "a known gap that passes must leave the list");
        Ok(())
    };
    (what, run)
}
