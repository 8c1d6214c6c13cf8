//! `make soak`: an operator with the timing that users have, for a long time, with faults that last as long as real ones.
//! It shows what short times and short runs do not: what grows, and what only ends after minutes.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testenv::{
    images::Image,
    proxy::{Action, Matcher, Proxy, Route},
};
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::support::{Operator, Place, condition};

/// The shortest interval that the API takes.
const INTERVAL: Duration = Duration::from_secs(30);
/// How long watches live at API servers and proxies of the field.
const WATCH: Duration = Duration::from_secs(290);
/// How long the target takes nothing.
const STALL: Duration = Duration::from_secs(90);
/// How long one source asks to be left alone, and how long another: a run waits for that.
const BACK_OFF: u32 = 300;
const PAUSE: u32 = 45;
/// After the last fault, until all is as it should be: the longest of them and what the operator waits for then.
const SETTLES: Duration = Duration::from_secs(BACK_OFF as u64 + 60);
/// What a layer of 4 MB takes 90 s with, without being too slow.
const SLOW: u64 = 45_000;
/// Connections that nobody uses, `timing.poolIdleTimeout`, and some time to see it.
const IDLE: Duration = Duration::from_secs(30);

const MIRRORS: [&str; 5] = ["steady", "stalled", "slow", "waited", "backoff"];

/// A mirror and the registries as it sees them.
struct Mirror {
    name: &'static str,
    source: Proxy,
    target: Proxy,
    image: Image,
}

struct Soak {
    place: Place,
    api: Proxy,
    operator: Operator,
    mirrors: Vec<Mirror>,
}

/// What the process takes at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    memory: u64,
    descriptors: usize,
}

impl Soak {
    async fn start() -> Result<Self> {
        let place = Place::new("soak").await?;
        let api = place.api_proxy().await?;
        let mut mirrors = Vec::new();
        for name in MIRRORS {
            let source = Proxy::to(place.env, &place.env.source).label(name).start().await?;
            let target = Proxy::to(place.env, &place.env.target).label(name);
            let target = if name == "slow" { target.bytes_per_second_up(SLOW) } else { target };
            mirrors.push(Mirror { name, source, target: target.start().await?, image: Image::single(0, &[10]) });
        }
        let sources: Vec<_> = mirrors.iter().map(|mirror| mirror.source.registry()).collect();
        let targets: Vec<_> = mirrors.iter().map(|mirror| mirror.target.registry()).collect();
        place.pull_secret("pull", &sources).await?;
        place.pull_secret("push", &targets).await?;
        // No timing: the defaults are what is tried.
        let config = json!({"networks": {"allow": ["127.0.0.0/8", "::1"]}, "watchNamespaces": [place.namespace]});
        let operator = place.operator_of(&config, &["--log-level", "info"])?;
        Ok(Self { place, api, operator, mirrors })
    }

    fn spec(&self, mirror: &Mirror) -> Value {
        let mut spec = self.place.spec(mirror.source.registry(), mirror.target.registry(), &[(mirror.name, &["1"])]);
        spec["interval"] = json!(format!("{}s", INTERVAL.as_secs()));
        spec
    }

    /// Moves the tag at each source, so that there is something to copy. The slow one is busy with one image for longer.
    async fn move_tags(&mut self, round: u64, with_slow: bool) -> Result<()> {
        for (number, mirror) in (0..).zip(&mut self.mirrors) {
            if mirror.name != "slow" || with_slow {
                let size = if mirror.name == "slow" { 4_000_000 } else { 300_000 };
                mirror.image = Image::single(round * 100 + number, &[size, 20_000]);
                self.place.push(&self.place.env.source, mirror.name, "1", &mirror.image).await?;
            }
        }
        Ok(())
    }

    fn mirror(&self, name: &str) -> Result<&Mirror> {
        self.mirrors.iter().find(|mirror| mirror.name == name).context("no such mirror")
    }

    fn begin_faults(&self) -> Result<()> {
        let uploads = Matcher::new().method("PUT").route(Route::Upload);
        self.mirror("stalled")?.target.rule(uploads, Action::StallRequestBody { after: 1000 });
        for (name, seconds) in [("waited", PAUSE), ("backoff", BACK_OFF)] {
            let once = Matcher::new().route(Route::Manifest).times(1);
            let closed = Action::respond(429).header("Retry-After", &seconds.to_string());
            self.mirror(name)?.source.rule(once, closed);
        }
        Ok(())
    }

    fn sample(&self) -> Result<Sample> {
        let process = format!("/proc/{}", self.operator.process.pid());
        let status = fs::read_to_string(format!("{process}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let memory = line.trim().trim_end_matches(" kB").parse::<u64>()? << 10;
        Ok(Sample { memory, descriptors: fs::read_dir(format!("{process}/fd"))?.count() })
    }

    /// Mirrors that are not Ready, or whose target does not hold what the source does.
    async fn wrong(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for Mirror { name, image, .. } in &self.mirrors {
            let status = self.place.mirrors().get(name).await?.status.unwrap_or_default();
            let holds = self.place.holds(&self.place.env.target, name, "1", image).await?;
            if condition(&status, "Ready").0 != "True" || !holds {
                wrong.push(format!("{name}: holds: {holds}: {:?}", condition(&status, "Ready")));
            }
        }
        Ok(wrong)
    }

    /// Whether all is in step; an error that says what is not, after the deadline.
    async fn is_settled(&self, deadline: Instant) -> Result<bool> {
        let wrong = self.wrong().await?;
        ensure!(wrong.is_empty() || Instant::now() < deadline, "not in step: {}", wrong.join("; "));
        Ok(wrong.is_empty())
    }

    /// Nothing to do and nothing open that is not always open.
    async fn idle(&self, suspend: bool) -> Result<Sample> {
        for mirror in &self.mirrors {
            let mut spec = self.spec(mirror);
            spec["suspend"] = json!(suspend);
            self.place.apply(mirror.name, &spec).await?;
        }
        sleep(IDLE).await;
        self.sample()
    }

    async fn metric(&self, name: &str) -> Result<String> {
        let metrics = self.operator.get("/metrics").await?.1;
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        Ok(line.trim().to_owned())
    }
}

fn median(samples: &[Sample]) -> u64 {
    let mut memory: Vec<u64> = samples.iter().map(|sample| sample.memory).collect();
    memory.sort_unstable();
    memory.get(memory.len() / 2).copied().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes SOAK_MINUTES: make soak"]
async fn soak_an_operator_with_its_own_timing_outlives_real_faults_and_grows_no_more() -> Result<()> {
    let minutes: u64 = std::env::var("SOAK_MINUTES").unwrap_or_else(|_| "30".to_owned()).parse()?;
    // The operator's token is good for an hour; one round of faults takes the least.
    ensure!((7..=50).contains(&minutes), "SOAK_MINUTES is 7 to 50");
    let mut soak = Soak::start().await?;
    soak.move_tags(0, true).await?;
    for mirror in &soak.mirrors {
        soak.place.apply(mirror.name, &soak.spec(mirror)).await?;
    }
    let mut ticks = interval(Duration::from_secs(5));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let begun = Instant::now();
    while !soak.is_settled(begun + SETTLES).await? {
        ticks.tick().await;
    }
    let first = soak.idle(true).await?;
    soak.idle(false).await?;
    soak.api.forget();

    let end = begun + Duration::from_mins(minutes);
    let (mut samples, mut rounds, mut reasons) = (Vec::new(), 0, HashMap::<String, usize>::new());
    let (mut fault, mut stalled, mut cut) = (None::<Instant>, None::<Instant>, Instant::now());
    while Instant::now() < end || stalled.is_some() || !soak.is_settled(end + SETTLES).await? {
        ticks.tick().await;
        samples.push(soak.sample()?);
        let is_time = fault.is_none_or(|begun| begun.elapsed() > SETTLES && Instant::now() + SETTLES < end);
        if is_time || (Instant::now() < end && samples.len() % 6 == 0) {
            rounds += 1;
            soak.move_tags(rounds, is_time).await?;
        }
        if is_time {
            (fault, stalled) = (Some(Instant::now()), Some(Instant::now()));
            soak.begin_faults()?;
        }
        if stalled.is_some_and(|begun| begun.elapsed() > STALL) {
            soak.mirror("stalled")?.target.clear();
            stalled = None;
        }
        if cut.elapsed() > WATCH {
            cut = Instant::now();
            soak.api.cut();
        }
    }
    for mirror in &soak.mirrors {
        for status in soak.place.statuses.seen(mirror.name) {
            for failure in status["failures"].as_array().into_iter().flatten() {
                let reason = failure["reason"].as_str().unwrap_or_default();
                *reasons.entry(format!("{} {reason}", mirror.name)).or_default() += 1;
            }
        }
    }
    let last = soak.idle(true).await?;
    let quarter = samples.len() / 4;
    let (early, late) = (median(&samples[quarter..2 * quarter]), median(&samples[3 * quarter..]));
    let peak = samples.iter().map(|sample| sample.memory).max().unwrap_or_default();
    let watches = soak.api.count(&Matcher::new().path_contains("watch=true"));
    let writes = soak.api.count(&Matcher::new().method("PATCH").path_contains("/status?"));
    println!("soaked for {minutes} minutes, {rounds} rounds of moved tags");
    println!("  runs: {}", soak.metric("imagemirror_sync_duration_seconds_count").await?);
    println!("  watches begun: {watches}, writes of a status: {writes}");
    println!("  memory: {} MiB at most, {} early, {} late", peak >> 20, early >> 20, late >> 20);
    println!("  open descriptors when idle: {} at the beginning, {} at the end", first.descriptors, last.descriptors);
    println!("  failures in statuses: {reasons:?}");
    let met = |proxy: &Proxy| proxy.requests().iter().filter(|exchange| !exchange.actions.is_empty()).count();
    let faults = [
        met(&soak.mirror("stalled")?.target),
        met(&soak.mirror("waited")?.source),
        met(&soak.mirror("backoff")?.source),
    ];
    println!("  requests that met with a stall, a short pause, a long one: {faults:?}");
    ensure!(faults.iter().all(|count| *count > 0), "a fault was not met with: {faults:?}");
    ensure!(!soak.operator.logged()?.contains("panicked"), "it panicked");
    ensure!(late <= early + early / 2 + (4 << 20), "memory grew from {early} to {late}");
    ensure!(last.descriptors <= first.descriptors + 4, "descriptors are left open");
    ensure!(reasons.contains_key("backoff RateLimited"), "the back-off was not seen: {reasons:?}");
    soak.operator.process.stop().await
}
