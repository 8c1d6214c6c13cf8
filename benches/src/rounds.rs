//! The runs: every client in turn copies a workload to a target that is new, and then once more, when there is nothing to
//! do. In the next round another one begins, so that whatever else the machine does falls on all.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::json;
use testenv::certs::Ca;
use testenv::tools::Tools;
use testenv::{Forwarder, Registry, RegistryOptions, RegistryServer};

use crate::measure::{self, Meter, Sample};
use crate::peers::{Client, Task};
use crate::workload::{Kind, Workload};

/// Each way, at each side: round trips of 20 ms.
const DELAY: Duration = Duration::from_millis(10);

/// A workload, and how far away the registries are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    #[value(name = "W1")]
    W1,
    #[value(name = "W2")]
    W2,
    #[value(name = "W1-far")]
    W1Far,
    #[value(name = "W2-far")]
    W2Far,
}

impl Case {
    pub(crate) const ALL: [Self; 4] = [Self::W1, Self::W2, Self::W1Far, Self::W2Far];

    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::W1 | Self::W1Far => Kind::W1,
            Self::W2 | Self::W2Far => Kind::W2,
        }
    }

    pub(crate) fn is_far(self) -> bool {
        matches!(self, Self::W1Far | Self::W2Far)
    }

    pub(crate) fn title(self) -> String {
        let distance = if self.is_far() { "20 ms round trips" } else { "direct" };
        format!("{}, {distance}", self.kind().name())
    }
}

/// All runs of a client in one case.
pub(crate) struct Series {
    pub(crate) case: Case,
    pub(crate) client: Client,
    /// To an empty target; an error is what the client failed of.
    pub(crate) fresh: Vec<Result<Sample, String>>,
    /// When everything is there.
    pub(crate) no_op: Vec<Result<Sample, String>>,
}

/// What all runs share.
pub(crate) struct Bench<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) run_dir: &'a Path,
    pub(crate) rounds: u32,
    pub(crate) deadline: Duration,
    ca: Ca,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(tools: &'a Tools, run_dir: &'a Path, rounds: u32, deadline: Duration) -> Result<Self> {
        let ca = Ca::generate()?;
        ca.save(&run_dir.join("ca.pem"), &run_dir.join("ca.key"))?;
        Ok(Self { tools, run_dir, rounds, deadline, ca })
    }

    /// Runs all cases, one after the other.
    pub(crate) async fn run(&self, cases: &[Case], clients: &[Client]) -> Result<Vec<Series>> {
        let mut all = Vec::new();
        for kind in [Kind::W1, Kind::W2] {
            let cases: Vec<Case> = cases.iter().copied().filter(|case| case.kind() == kind).collect();
            if cases.is_empty() {
                continue;
            }
            eprintln!("{}: filling the source", kind.name());
            let source = Place::start(self, "source").await?;
            let workload = kind.fill(&self.client(source.server.registry())?).await?;
            for case in cases {
                all.extend(self.case(case, clients, &source, &workload).await?);
            }
        }
        Ok(all)
    }

    async fn case(&self, case: Case, clients: &[Client], source: &Place, workload: &Workload) -> Result<Vec<Series>> {
        let clients = clients.iter().filter(|client| client.takes(case.kind()));
        let series = |client: &Client| Series { case, client: client.clone(), fresh: Vec::new(), no_op: Vec::new() };
        let mut all: Vec<Series> = clients.map(series).collect();
        let line = self.line(case, source).await?;
        let from = line.as_ref().map_or_else(|| source.server.host().to_owned(), Forwarder::host);
        let mut meter = Meter::of(&source.server);
        for round in 0..self.rounds {
            let first = round as usize % all.len().max(1);
            let (after, before) = all.split_at_mut(first);
            for series in before.iter_mut().chain(after) {
                let [fresh, no_op] = self.turn(series, &from, &mut meter, workload).await?;
                eprintln!(
                    "{}, round {}/{}: {:<12} {}; again: {}",
                    case.title(),
                    round + 1,
                    self.rounds,
                    series.client.name,
                    words(&fresh),
                    words(&no_op)
                );
                series.fresh.push(fresh);
                series.no_op.push(no_op);
            }
        }
        Ok(all)
    }

    /// One client copies to a new target, and then again.
    async fn turn(
        &self,
        series: &Series,
        from: &str,
        source: &mut Meter,
        workload: &Workload,
    ) -> Result<[Result<Sample, String>; 2]> {
        let target = Place::start(self, "target").await?;
        let line = self.line(series.case, &target).await?;
        let to = line.as_ref().map_or_else(|| target.server.host().to_owned(), Forwarder::host);
        let mut meter = Meter::of(&target.server);
        let dir = tempfile::tempdir_in(self.run_dir)?;
        let ca_path = self.run_dir.join("ca.pem");
        let task = Task {
            source: from,
            target: &to,
            workload,
            ca_pem: self.ca.cert_pem(),
            ca_path: &ca_path,
            dir: dir.path(),
        };
        let command = series.client.command(&task)?;
        let said = |error: anyhow::Error| {
            // What is published names no place of this machine.
            let places = [(self.run_dir.display().to_string(), "RUN"), (from.into(), "SOURCE"), (to.clone(), "TARGET")];
            places.iter().fold(format!("{error:#}"), |text, (place, name)| text.replace(place, name))
        };
        let mut samples = [const { Err(String::new()) }; 2];
        for (sample, log) in samples.iter_mut().zip(["fresh.log", "no-op.log"]) {
            let meters = [&mut *source, &mut meter];
            let run = measure::sample(&command, self.deadline, &dir.path().join(log), meters).await;
            // Nobody wins by doing nothing.
            let run = match run {
                Ok(run) => self.verify(target.server.registry(), workload).await.map(|()| run),
                Err(error) => Err(error),
            };
            *sample = run.map_err(said);
            if sample.is_err() {
                break;
            }
        }
        if let [Err(_), no_op] = &mut samples {
            *no_op = Err("there was nothing to begin with".to_owned());
        }
        target.server.stop().await?;
        Ok(samples)
    }

    /// An error unless every tag has at the target the digest that it has at the source. The registry takes no
    /// manifest whose parts it does not have.
    async fn verify(&self, target: &Registry, workload: &Workload) -> Result<()> {
        let client = self.client(target)?;
        for tagged in &workload.tags {
            let found = client.digest_of(&tagged.repository, &tagged.tag).await?;
            ensure!(
                found.as_ref() == Some(&tagged.digest),
                "{}:{} is not at the target as it is at the source",
                tagged.repository,
                tagged.tag
            );
        }
        Ok(())
    }

    fn client(&self, registry: &Registry) -> Result<testenv::Client> {
        testenv::Client::trusting(self.ca.cert_pem(), registry)
    }

    async fn line(&self, case: Case, place: &Place) -> Result<Option<Forwarder>> {
        if !case.is_far() {
            return Ok(None);
        }
        Ok(Some(Forwarder::to(place.server.host()).delay(DELAY).start().await?))
    }
}

/// A registry with storage of its own, which is removed with it.
struct Place {
    server: RegistryServer,
    _storage: tempfile::TempDir,
}

impl Place {
    /// On the file system of the run, which should be one in memory. Distribution's own storage in memory copies what
    /// it has of a blob with each piece that arrives, and all wait for that.
    async fn start(bench: &Bench<'_>, name: &str) -> Result<Self> {
        let storage = tempfile::tempdir_in(bench.run_dir).context("make the registry's storage")?;
        let extra = json!({ "storage": { "filesystem": { "rootdirectory": storage.path() } } });
        let options = RegistryOptions { name: name.to_owned(), disk: true, extra, ..RegistryOptions::default() };
        let server = RegistryServer::start_in(bench.tools, bench.run_dir, &bench.ca, options).await?;
        Ok(Self { server, _storage: storage })
    }
}

fn words(sample: &Result<Sample, String>) -> String {
    match sample {
        Ok(sample) => format!(
            "{:.2} s, CPU {:.2} s, {:.0} MiB, {:.0} + {:.0} requests",
            sample.wall, sample.cpu, sample.memory, sample.target_requests, sample.source_requests
        ),
        Err(error) => format!("failed: {error}"),
    }
}
