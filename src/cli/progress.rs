//! How far a sync is, on standard error: bars on a terminal, a line now and then elsewhere. What became of each image is
//! said as soon as it is known, on standard output where that is the report, else beside the progress.

use std::{
    convert::Infallible,
    io::{IsTerminal as _, Write as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::ValueEnum;
use console::Term;
use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use tokio::time::{Instant, interval, sleep_until};

use super::{Output, bytes, say};
use crate::{
    copy::{Counter, Progress, ProgressSnapshot},
    sync::{ImageReport, Watch},
};

/// Between two looks at the counters.
const TICK: Duration = Duration::from_millis(100);
/// Until the first line, and between two lines, as for `status.progress`.
const FIRST_LINE: Duration = Duration::from_secs(2);
const BETWEEN_LINES: Duration = Duration::from_secs(10);
/// Room for the name of an image.
const NAME_WIDTH: usize = 28;
/// More bars say nothing.
const MAX_BARS: usize = 16;
/// Lines of a terminal that are left to others: the sum, the command, the line of the cursor.
const OTHER_LINES: u16 = 3;
const TEMPLATE: &str = "{prefix:28!} {wide_bar:.cyan/dim} {decimal_bytes:>9} of {decimal_total_bytes:9} {decimal_bytes_per_sec:>11} {eta:>4} left";

/// How progress is shown.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Style {
    /// Bars if standard error is a terminal, else lines.
    Auto,
    /// A bar for each image under way, and one for all.
    Bars,
    /// A line now and then.
    Plain,
    /// Nothing.
    None,
}

/// Shows one sync.
pub(super) struct Screen {
    /// What the sync is called.
    name: String,
    pub(super) progress: Arc<Progress>,
    how: How,
    output: Output,
    /// What became of an image, in a line.
    line: fn(&ImageReport) -> String,
}

enum How {
    Bars(Box<Bars>),
    Lines,
    Silent,
}

struct Bars {
    all: MultiProgress,
    sum: ProgressBar,
    images: Mutex<Vec<ImageBar>>,
    most: usize,
    style: ProgressStyle,
}

/// An image that is under way.
struct ImageBar {
    target: String,
    source: String,
    counter: Arc<Counter>,
    /// There once it has something to copy, and room.
    bar: Option<ProgressBar>,
}

impl Screen {
    pub(super) fn new(name: &str, style: Style, output: Output, line: fn(&ImageReport) -> String) -> Self {
        let terminal = Term::stderr();
        let how = match style {
            Style::Auto if std::io::stderr().is_terminal() => How::Bars(Box::new(Bars::on(&terminal))),
            Style::Bars => How::Bars(Box::new(Bars::on(&terminal))),
            Style::Auto | Style::Plain => How::Lines,
            Style::None => How::Silent,
        };
        Self { name: name.to_owned(), progress: Arc::default(), how, output, line }
    }

    /// Shows how far `sync` is until it ends.
    pub(super) async fn follow<T>(&self, sync: impl Future<Output = T>) -> T {
        let ended = tokio::select! {
            ended = sync => ended,
            never = self.show() => match never {},
        };
        if let How::Bars(bars) = &self.how {
            bars.clear();
        }
        ended
    }

    async fn show(&self) -> Infallible {
        match &self.how {
            How::Bars(bars) => {
                let mut ticks = interval(TICK);
                loop {
                    ticks.tick().await;
                    bars.draw(&self.progress.snapshot());
                }
            }
            How::Lines => lines(|| self.progress.snapshot(), |line| eprintln!("{}: {line}", self.name)).await,
            How::Silent => std::future::pending().await,
        }
    }
}

impl Watch for Screen {
    fn began(&self, image: &ImageReport) -> Option<Arc<Counter>> {
        let How::Bars(bars) = &self.how else { return None };
        let counter = Arc::new(Counter::default());
        let (target, source) = (image.target.clone(), image.name());
        bars.images().push(ImageBar { target, source, counter: Arc::clone(&counter), bar: None });
        Some(counter)
    }

    fn ended(&self, image: &ImageReport) {
        let line = (self.line)(image);
        let write = || match (self.output, &self.how) {
            (Output::Text, _) => say(&format!("{line}\n")),
            (Output::Json, How::Silent) => {}
            (Output::Json, _) => eprintln!("{line}"),
        };
        match &self.how {
            How::Bars(bars) => {
                bars.remove(&image.target);
                bars.all.suspend(write);
            }
            How::Lines | How::Silent => write(),
        }
    }
}

impl Bars {
    fn on(terminal: &Term) -> Self {
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
        let style = style.progress_chars("━━─");
        let (height, _) = terminal.size();
        let most = usize::from(height.saturating_sub(OTHER_LINES)).clamp(1, MAX_BARS);
        let all = MultiProgress::new();
        let sum = all.add(ProgressBar::new(0).with_style(style.clone()));
        Self { all, sum, images: Mutex::default(), most, style }
    }

    fn images(&self) -> std::sync::MutexGuard<'_, Vec<ImageBar>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self, snapshot: &ProgressSnapshot) {
        let mut images = self.images();
        let mut shown = images.iter().filter(|image| image.bar.is_some()).count();
        for image in images.iter_mut().filter(|image| image.counter.total() > 0) {
            if image.bar.is_none() && shown < self.most {
                let bar = ProgressBar::new(0).with_style(self.style.clone()).with_prefix(short(&image.source));
                image.bar = Some(self.all.insert_before(&self.sum, bar));
                shown += 1;
            }
            if let Some(bar) = &image.bar {
                bar.set_length(image.counter.total());
                bar.set_position(image.counter.done());
            }
        }
        self.sum.set_prefix(format!("{} of {} images", snapshot.images_done, snapshot.images_total));
        self.sum.set_length(snapshot.bytes_total);
        self.sum.set_position(snapshot.bytes_done);
    }

    fn remove(&self, target: &str) {
        let mut images = self.images();
        if let Some(at) = images.iter().position(|image| image.target == target)
            && let Some(bar) = images.remove(at).bar
        {
            bar.finish_and_clear();
            self.all.remove(&bar);
        }
    }

    fn clear(&self) {
        for image in self.images().drain(..) {
            image.bar.iter().for_each(ProgressBar::finish_and_clear);
        }
        self.sum.finish_and_clear();
        // What is left of the bars is gone before anything else is written.
        let _ = self.all.clear().and_then(|()| std::io::stderr().flush());
    }
}

/// Writes a line after a little while, and then now and then, while there is something to copy.
async fn lines(look: impl Fn() -> ProgressSnapshot, mut write: impl FnMut(String)) -> Infallible {
    let since = Instant::now();
    let mut next = since + FIRST_LINE;
    loop {
        sleep_until(next).await;
        next += BETWEEN_LINES;
        let snapshot = look();
        if snapshot.bytes_done < snapshot.bytes_total {
            write(in_words(&snapshot, since.elapsed()));
        }
    }
}

/// How far a run is, how fast, and how long it will take if what is known by now is all.
fn in_words(progress: &ProgressSnapshot, after: Duration) -> String {
    let ProgressSnapshot { bytes_done, bytes_total, images_done, images_total } = *progress;
    let rate = u64::try_from(u128::from(bytes_done) * 1000 / after.as_millis().max(1)).unwrap_or(u64::MAX);
    let left = (bytes_total - bytes_done.min(bytes_total)).checked_div(rate);
    let left =
        left.map_or_else(|| "?".to_owned(), |seconds| format!("{:#}", HumanDuration(Duration::from_secs(seconds))));
    let (done, total, rate) = (bytes(bytes_done), bytes(bytes_total), bytes(rate));
    format!("{images_done} of {images_total} images, {done} of {total}, {rate}/s, {left} left")
}

/// The end of a name, which tells images apart.
fn short(name: &str) -> String {
    let length = name.chars().count();
    if length <= NAME_WIDTH {
        return name.to_owned();
    }
    let end: String = name.chars().skip(length + 1 - NAME_WIDTH).collect();
    format!("…{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_rate_and_what_is_left() {
        let snapshot =
            ProgressSnapshot { bytes_done: 20_000_000, bytes_total: 50_000_000, images_done: 1, images_total: 3 };
        let said = in_words(&snapshot, Duration::from_secs(2));
        assert_eq!(said, "1 of 3 images, 20.0 MB of 50.0 MB, 10.0 MB/s, 3s left");
        let said = in_words(&ProgressSnapshot { bytes_done: 0, ..snapshot }, Duration::from_secs(2));
        assert_eq!(said, "1 of 3 images, 0 B of 50.0 MB, 0 B/s, ? left");
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_comes_after_two_seconds_and_then_every_ten_while_there_is_something_to_copy() {
        let until = |end: u64| move |now: u64| now < end;
        for (copies, expected) in [(until(100), vec![2, 12, 22, 32]), (until(20), vec![2, 12]), (until(0), vec![])] {
            let begun = Instant::now();
            let look = || ProgressSnapshot {
                bytes_done: u64::from(!copies(begun.elapsed().as_secs())),
                bytes_total: 1,
                ..ProgressSnapshot::default()
            };
            let mut written = Vec::new();
            let all = lines(look, |_| written.push(begun.elapsed().as_secs()));
            assert!(tokio::time::timeout(Duration::from_secs(33), all).await.is_err());
            assert_eq!(written, expected);
        }
    }

    #[test]
    fn of_long_names_the_end_is_shown() {
        assert_eq!(short("a:1"), "a:1");
        let long = short("registry.example.com/team/project/application:1.2.3");
        assert_eq!((long.chars().count(), long.as_str()), (NAME_WIDTH, "…m/project/application:1.2.3"));
    }
}
