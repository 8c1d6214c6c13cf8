//! `kubectl imagemirror …`: the same program under the name `kubectl-imagemirror`, for the objects of a cluster and with the
//! rights of the user.
//!
//! | code | means |
//! |---|---|
//! | 0 | done; with `sync --wait`, all is in step |
//! | 1 | something failed |
//! | 2 | the command or the kubeconfig is wrong |
//! | 3 | `sync --wait`: tags at the target were left, as the policy wants it |
//! | 4 | `diff`: there is something to do |
//! | 130 | interrupted |

mod check;
mod cluster;
mod diff;
mod list;
mod status;
mod suspend;
mod sync;
mod table;

use clap::{Parser, Subcommand};

use super::{Failure, runtime};
use cluster::{Cluster, Connection};

/// The name under which kubectl finds the program.
pub(super) const NAME: &str = "kubectl-imagemirror";

/// Shows and steers the ImageMirrors of a cluster.
#[derive(Debug, Parser)]
#[command(name = NAME, bin_name = "kubectl imagemirror", version, about, arg_required_else_help = true)]
pub(super) struct Plugin {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List ImageMirrors.
    List(list::Arguments),
    /// Say how an ImageMirror is: conditions, the last sync, failures, images.
    Status(status::Arguments),
    /// Sync an ImageMirror now.
    Sync(sync::Arguments),
    /// Start no more syncs; one that is running ends by itself.
    Suspend(suspend::Arguments),
    /// Start syncs again.
    Resume(suspend::Arguments),
    /// Say what a sync of an ImageMirror would do, and why; change nothing. Asks the registries from here, with the Secrets
    /// that the ImageMirror names.
    Diff(diff::Arguments),
    /// Say which login is used for which registry, and whether pull and push would work; copy nothing. Asks the registries
    /// from here, with the Secrets that the ImageMirror names.
    Check(check::Arguments),
}

pub(super) fn run(plugin: Plugin) -> Result<(), Failure> {
    let Plugin { command, connection } = plugin;
    runtime()?.block_on(async {
        let cluster = Cluster::connect(&connection).await?;
        match command {
            Command::List(arguments) => list::run(&cluster, &arguments).await,
            Command::Status(arguments) => status::run(&cluster, &arguments).await,
            Command::Sync(arguments) => sync::run(&cluster, &arguments).await,
            Command::Suspend(arguments) => suspend::run(&cluster, &arguments, true).await,
            Command::Resume(arguments) => suspend::run(&cluster, &arguments, false).await,
            Command::Diff(arguments) => diff::run(&cluster, &arguments).await,
            Command::Check(arguments) => check::run(&cluster, &arguments).await,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory as _;
        Plugin::command().debug_assert();
    }
}
