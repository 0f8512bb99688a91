// Command relay publishes the messages of an outbox to RabbitMQ, and is the
// operator's tool for its tables.
//
//	relay run        publish until told to stop
//	relay migrate    bring the tables up to date
//	relay status     what waits, what is parked, who publishes
//
// Flags go over environment variables, these over defaults; "relay run --help"
// lists all. It exits with 0 after a clean stop, 1 after a failure, and 2 if flags
// or variables are wrong, with all mistakes at once. A second signal ends it at
// once, with 1.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
)

type cli struct {
	Run     runCommand     `cmd:"" help:"Publish messages until told to stop (SIGTERM, SIGINT; the second one ends at once)."`
	Migrate migrateCommand `cmd:"" help:"Show or change the version of the tables."`
	Status  statusCommand  `cmd:"" help:"Show what waits, what is parked, and which relays live."`
	Version versionCommand `cmd:"" help:"Print the version of this program."`
}

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		// timeout(1) and some supervisors send the first one twice: to the process
		// and to its group.
		for first := time.Now(); ; {
			<-signals
			if time.Since(first) > oneSignal {
				os.Exit(1)
			}
		}
	}()
	os.Exit(run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// oneSignal is how long the first signal may take to arrive in full.
const oneSignal = 100 * time.Millisecond

func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) int {
	exit := -1
	parser := kong.Must(&cli{},
		kong.Name("relay"),
		kong.Description("The relay of txbox: publishes the outbox to RabbitMQ."),
		kong.Writers(stdout, stderr),
		kong.Exit(func(code int) { exit = code }), // after --help
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.BindTo(stdout, (*io.Writer)(nil)),
	)
	switch {
	case len(args) == 0:
		args = []string{"--help"}
	case args[0] == "help": // as the go command has it: relay help run
		args = append(args[1:], "--help")
	case args[0] == "--version":
		args = []string{"version"}
	}
	unsetEmptyVariables(environ)
	known, unknown := unknownArguments(parser.Model.Node, args)
	found := append(unknown, unknownVariables(parser.Model.Node, environ)...)
	parsed, err := parser.Parse(known)
	if exit >= 0 {
		return exit
	}
	if err != nil {
		err = wrongUsage(append(found, withoutArguments(args, err)))
	} else {
		err = parsed.Run(found)
	}
	return report(stderr, err)
}

// report prints err and returns the exit code.
func report(stderr io.Writer, err error) int {
	var usage usageError
	switch {
	case errors.As(err, &usage):
		fmt.Fprintln(stderr, "relay:", strings.ReplaceAll(err.Error(), "\n", "\n  "))
		return 2
	case err != nil:
		fmt.Fprintln(stderr, "relay:", strings.TrimPrefix(err.Error(), "relay: "))
		return 1
	}
	return 0
}

type versionCommand struct{}

// Run prints what the Go toolchain noted when it built the program.
func (versionCommand) Run(out io.Writer, found mistakes) error {
	if err := wrongUsage(found); err != nil {
		return err
	}
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
