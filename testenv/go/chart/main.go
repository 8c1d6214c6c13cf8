// Command promql reads PromQL expressions from standard input, a JSON string a line, and prints for each of them what it asks
// for, as JSON: the metrics with the labels that it selects by, and the labels that it groups by. An expression that does
// not parse ends it with an error.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

type asked struct {
	Metrics map[string][]string `json:"metrics"`
	Groups  []string            `json:"groups"`
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if err := show(lines.Bytes()); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", lines.Bytes(), err)
			os.Exit(1)
		}
	}
}

func show(line []byte) error {
	var text string
	if err := json.Unmarshal(line, &text); err != nil {
		return err
	}
	expression, err := parser.NewParser(parser.Options{}).ParseExpr(text)
	if err != nil {
		return err
	}
	found := asked{Metrics: map[string][]string{}, Groups: []string{}}
	parser.Inspect(expression, func(node parser.Node, _ []parser.Node) error {
		switch node := node.(type) {
		case *parser.VectorSelector:
			names := found.Metrics[node.Name]
			for _, matcher := range node.LabelMatchers {
				if matcher.Name != labels.MetricName {
					names = append(names, matcher.Name)
				}
			}
			found.Metrics[node.Name] = append([]string{}, names...)
		case *parser.AggregateExpr:
			found.Groups = append(found.Groups, node.Grouping...)
		case *parser.BinaryExpr:
			if node.VectorMatching != nil {
				found.Groups = append(found.Groups, node.VectorMatching.MatchingLabels...)
			}
		}
		return nil
	})
	return json.NewEncoder(os.Stdout).Encode(found)
}
