// Command relay publishes the messages of an outbox to RabbitMQ, and is the
// operator's tool for its tables.
//
//	relay run        publish until told to stop
//	relay migrate    bring the tables up to date
//	relay status     what waits, what is parked, who publishes
//
// Flags go over environment variables, these over defaults; "relay run --help"
// lists all. It exits with 0 after a clean stop, 1 after a failure, and 2 if flags
// or variables are wrong, with all mistakes at once.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"
)

type cli struct {
	Run     runCommand     `cmd:"" help:"Publish messages until told to stop (SIGTERM, SIGINT; the second one ends at once)."`
	Migrate migrateCommand `cmd:"" help:"Show or change the version of the tables."`
	Status  statusCommand  `cmd:"" help:"Show what waits, what is parked, and which relays live."`
	Version versionCommand `cmd:"" help:"Print the version of this program."`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the next signal has its usual effect
	os.Exit(run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// usageError is about what the caller wrote, not about what happened.
type usageError struct{ error }

func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) int {
	exit := -1
	parser := kong.Must(&cli{},
		kong.Name("relay"),
		kong.Description("The relay of txbox: publishes the outbox to RabbitMQ."),
		kong.Writers(stdout, stderr),
		kong.Exit(func(code int) { exit = code }), // after --help
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.BindTo(stdout, (*io.Writer)(nil)),
		kong.UsageOnError(),
	)
	if len(args) == 0 {
		args = []string{"--help"}
	}
	parsed, err := parser.Parse(args)
	if exit >= 0 {
		return exit
	}
	if err != nil {
		fmt.Fprintln(stderr, "relay:", err)
		return 2
	}
	unknown := unknownVariables(parser, environ)
	err = parsed.Run(unknown)
	var usage usageError
	switch {
	case errors.As(err, &usage):
		fmt.Fprintln(stderr, "relay:", strings.ReplaceAll(err.Error(), "\n", "\n  "))
		return 2
	case err != nil:
		fmt.Fprintln(stderr, "relay:", err)
		return 1
	}
	return 0
}

// variables are the TXBOX_ variables that no flag has.
type variables []string

// problems has one for each.
func (v variables) problems() (problems []error) {
	for _, name := range v {
		problems = append(problems, fmt.Errorf("$%s: there is no such setting", name))
	}
	return problems
}

func unknownVariables(parser *kong.Kong, environ []string) (unknown variables) {
	known := map[string]bool{}
	for _, name := range secretVariables {
		known[name], known[name+fileSuffix] = true, true
	}
	nodes := []*kong.Node{parser.Model.Node}
	for len(nodes) > 0 {
		node := nodes[0]
		nodes = append(nodes[1:], node.Children...)
		for _, flag := range node.Flags {
			for _, name := range flag.Envs {
				known[name] = true
			}
		}
	}
	kubernetes := slices.ContainsFunc(environ, func(v string) bool { return strings.HasPrefix(v, "KUBERNETES_SERVICE_HOST=") })
	for _, variable := range environ {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, "TXBOX_") || known[name] {
			continue
		}
		// Kubernetes tells each pod of each service: TXBOX_SERVICE_HOST, TXBOX_PORT_80_TCP.
		if kubernetes && (strings.Contains(name, "_SERVICE_") || strings.Contains(name, "_PORT")) {
			continue
		}
		unknown = append(unknown, name)
	}
	slices.Sort(unknown)
	return unknown
}

type versionCommand struct{}

// Run prints what the Go toolchain noted when it built the program.
func (versionCommand) Run(out io.Writer) error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return errors.New("built without version information")
	}
	version, revision := info.Main.Version, ""
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			revision = " " + setting.Value
		}
	}
	_, err := fmt.Fprintf(out, "relay %s%s %s\n", version, revision, info.GoVersion)
	return err
}
