// Command gitops does what GitOps tools do, for tests:
//
//	gitops lua FOLDER     reads objects from standard input, a JSON document a line, and prints what Argo CD's scripts in
//	                      FOLDER say of each: its health, its actions, and the object after each action
//	gitops wait FLAGS     waits for an ImageMirror as Flux does
//	gitops decode         reads YAML documents from standard input, and fails if one is not what Flux's types are
package main

import (
	"fmt"
	"os"
)

func main() {
	commands := map[string]func([]string) error{"lua": runLua, "wait": wait, "decode": decode}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "gitops lua|wait|decode")
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
