//! T17 and R12 while layers are under way: who is slow, or wants to be left alone, holds no place that others wait for.

use std::{sync::LazyLock, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use imagemirror::{
    reason::Reason,
    registry::{Client, Floor, HostOptions, Timing},
};
use testenv::{
    images::{Content, Image},
    proxy::{Action, Close, Exchange},
};

use super::bench::{
    Bench, IMAGE, Row,
    Side::{Source, Target},
    cancel, cut, fault, get_blob, large, lines, options, post_blob, put_blob, put_manifest, row, small,
};

/// More than the buffers of a connection on this machine hold.
static BIG: LazyLock<Image> = LazyLock::new(|| Image::single(441, &[7 << 20]));

pub(super) fn rows() -> Vec<Row> {
    [slow(), paused()].into_iter().flatten().collect()
}

fn floor(timing: &mut Timing) {
    timing.floor = Floor { per_second: 50_000, window: Duration::from_secs(1) };
}

fn throttled(bytes_per_second: u64) -> Action {
    Action::Throttle { bytes_per_second }
}

fn slow() -> Vec<Row> {
    let source = [
        fault("T17-slow", "a download that is too slow is continued on another connection")
            .at(Source, get_blob(large()).times(1), throttled(15_000))
            .timing(floor)
            .seen(Source, get_blob(large()), 2..=2)
            .seen(Target, put_blob(large()), 1..=1)
            .sent_once(),
        fault("T17-always", "one that always is does not hold anybody for hours")
            .at(Source, get_blob(large()), throttled(15_000))
            .timing(floor)
            .fails(&[Reason::SourceUnavailable])
            .seen(Source, get_blob(large()), 4..=4)
            .seen(Target, put_blob(large()), 1..=1)
            .seen(Target, cancel(), 1..=2)
            .seen(Target, put_manifest("1"), 0..=0),
        fault("T17-cut", "nor one that breaks off before it is found to be too slow")
            .at(Source, get_blob(large()), cut(1_000, Close::Fin))
            .fails(&[Reason::SourceUnavailable])
            .seen(Source, get_blob(large()), 4..=4)
            .seen(Target, put_manifest("1"), 0..=0),
        fault("T17-enough", "a line that is narrow and not too slow is left alone")
            .at(Source, get_blob(large()), throttled(500_000))
            .timing(floor)
            .seen(Source, get_blob(large()), 1..=1)
            .seen(Target, put_blob(large()), 1..=1)
            .sent_once(),
    ];
    let mut rows: Vec<Row> = source.map(Row::from).into();
    rows.push(row("T17-target", "a target that is too slow: the source is not blamed", |bench| slow_target(bench, 1)));
    rows.push(row("T17-target-always", "the same, always", |bench| slow_target(bench, 100)));
    rows
}

fn layer(image: &Image) -> Result<&Content> {
    image.blobs.iter().max_by_key(|blob| blob.bytes.len()).context("no blobs")
}

async fn slow_target(bench: Bench, times: u32) -> Result<()> {
    let bench = bench.of(&BIG).await?;
    let put = put_blob(layer(&BIG)?);
    bench.target.rule(put.clone().times(times), throttled(15_000));
    let mut options = options();
    floor(&mut options.timing);
    if times > 1 {
        options.timing.floor.window /= 3;
    }
    // What fills a buffer moves at once, and then nothing for long.
    options.timing.idle = Duration::from_mins(2);
    let report = bench.copy_with(&Client::new(options), &bench.to).await?;
    if times == 1 {
        bench.copied(&report, &bench.to, &BIG).await?;
    } else {
        bench.failed(&report, &[Reason::TargetUnavailable], None).await?;
    }
    let (puts, reads) = (bench.target.count(&put), bench.source.count(&get_blob(layer(&BIG)?)));
    // A line that waits for long may break, and be taken up again, once.
    let reads_are_few = (puts..=puts + 1).contains(&reads);
    ensure!((2..=4).contains(&puts) && reads_are_few, "{}{}", lines(&bench.source), lines(&bench.target));
    Ok(())
}

fn busy(seconds: u32) -> Action {
    Action::respond(429).header("Retry-After", &seconds.to_string())
}

fn impatient(timing: &mut Timing) {
    timing.hold = Duration::from_millis(100);
}

fn paused() -> Vec<Row> {
    let broken = |id: &str, what: &str| {
        fault(id, what)
            .at(Source, get_blob(large()).times(1), cut(500_000, Close::Fin))
            .at(Source, get_blob(large()).times(1), busy(1))
            .seen(Source, get_blob(large()), 3..=3)
    };
    let at_once = |id: &str, blob: &Content| {
        fault(id, "a source that wants to be left alone before anything was sent: one session")
            .at(Source, get_blob(blob).times(1), busy(1))
            .timing(impatient)
            .seen(Source, get_blob(blob), 2..=2)
            .seen(Target, post_blob(blob), 1..=1)
            .seen(Target, put_blob(blob), 1..=1)
    };
    let rows = [
        broken("R12-short", "for a short while the upload stays open")
            .seen(Target, put_blob(large()), 1..=1)
            .sent_once(),
        broken("R12-long", "for a longer one it is dropped, and begins anew")
            .timing(impatient)
            .seen(Target, post_blob(large()), 2..=2)
            .seen(Target, put_blob(large()), 2..=2),
        at_once("R12-open-large", large()),
        at_once("R12-open-small", small()),
    ];
    let mut rows: Vec<Row> = rows.map(Row::from).into();
    rows.push(row("R12-released", "who waits for a source holds no place at the target", released));
    rows
}

/// Two copies from two sources, and room for one large stream at the target.
async fn released(bench: Bench) -> Result<()> {
    bench.source.rule(get_blob(large()).times(1), cut(500_000, Close::Fin));
    bench.source.rule(get_blob(large()).times(1), busy(50));
    let mut options = options();
    impatient(&mut options.timing);
    options.hosts.insert(bench.target.host().parse()?, HostOptions { streams: 1, ..HostOptions::default() });
    let client = Client::new(options);
    let (other, beside) = (bench.listener().await?, bench.beside("other"));
    let second = async {
        let is_asked = |log: &[Exchange]| log.iter().any(|exchange| exchange.status == Some(429));
        bench.source.wait_for(is_asked, Duration::from_secs(30)).await?;
        bench.copy_between(&client, other.registry(), bench.target.registry(), &beside).await
    };
    let report = tokio::select! {
        _ = bench.copy_with(&client, &bench.to) => bail!("the first copy has ended before the second"),
        report = second => report?,
    };
    bench.copied(&report, &beside, &IMAGE).await?;
    let (reads, puts) = (bench.source.count(&get_blob(large())), bench.target.count(&put_blob(large())));
    ensure!((reads, puts) == (2, 2), "{}{}", lines(&bench.source), lines(&bench.target));
    Ok(())
}
