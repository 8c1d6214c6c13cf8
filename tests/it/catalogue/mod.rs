//! The fault catalogue as a table: what registries, networks and attackers do, and what must be seen then. Every row is
//! a copy with proxies and a repository of its own; all rows run side by side and one run shows every failure.
//!
//! The ids are those of the catalogue of faults (R1 to R38) and of the threat model (T1 to T17); `Q` is a quirk that a
//! registry is known for.

mod auth;
mod bench;
mod downloads;
mod foreign;
mod leaks;
mod listener;
mod quirks;
mod slow;
mod threats;
mod uploads;
mod whole;

use std::{collections::HashSet, sync::Arc};

use anyhow::{Result, ensure};

use self::bench::{Bench, Row, World};

/// Rows that fail because of the product. One that passes must leave the list.
const KNOWN_GAPS: &[&str] = &[];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_of_the_catalogue_ends_as_it_should() -> Result<()> {
    let world = Arc::new(World::start().await?);
    let rows = rows();
    let ids: HashSet<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    ensure!(ids.len() == rows.len(), "an id is there twice");
    let unknown: Vec<_> = KNOWN_GAPS.iter().filter(|gap| !ids.contains(**gap)).collect();
    ensure!(unknown.is_empty(), "no rows: {unknown:?}");
    let cases: Vec<_> = rows.into_iter().enumerate().map(|(number, row)| case(&world, number, row)).collect();
    crate::cases::side_by_side(cases).await
}

pub(crate) fn rows() -> Vec<Row> {
    let tables = [
        downloads::rows(),
        uploads::rows(),
        auth::rows(),
        whole::rows(),
        leaks::rows(),
        threats::rows(),
        foreign::rows(),
        quirks::rows(),
        slow::rows(),
    ];
    tables.into_iter().flatten().collect()
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
