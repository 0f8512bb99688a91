// Command chaos does harm to producers, relays, consumers and their servers, and says whether
// a message was lost, doubled, reordered or changed:
//
//	chaos run -duration=60s -seed=1 -faults=relay,broker-kill
//
// Its last line is one JSON object. The processes that it harms are this program in another
// role: producer, relay or consumer. It is built with -tags failpoint, and needs the servers
// of "make up", where it writes down what it sees; those that it harms are its own.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// options are those of all roles.
type options struct {
	dir                        string
	duration, drainLimit, hold time.Duration
	seed                       uint64
	rate                       int // transactions a second, of all producers or of this one
	faults                     []fault

	name, outcomes, canary string
	amqpURL, queue         string
	batch, incarnation     int
	async                  bool
}

// errBroken is all said by the last line.
var errBroken = errors.New("invariants are broken")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := work(ctx, os.Args[1:]); errors.Is(err, errBroken) {
		os.Exit(1)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func work(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("usage: chaos run|producer|relay|consumer")
	}
	o := options{amqpURL: os.Getenv("AMQP_URL")}
	flags := flag.NewFlagSet("chaos "+args[0], flag.ContinueOnError)
	flags.StringVar(&o.dir, "dir", ".dev/chaos", "`folder` for servers and logs")
	flags.DurationVar(&o.duration, "duration", time.Minute, "how long faults are done")
	flags.Uint64Var(&o.seed, "seed", 1, "decides which faults are done")
	flags.IntVar(&o.rate, "rate", 800, "transactions a second")
	flags.DurationVar(&o.drainLimit, "drain-limit", time.Minute, "how long nothing may happen before it is said to be stuck")
	flags.DurationVar(&o.hold, "hold", 6*time.Second, "how long a fault holds at most: longer than a lease, and than a confirm is waited for")
	names := flags.String("faults", "", "only those whose names begin so; several with commas")
	flags.StringVar(&o.name, "name", "", "of a process")
	flags.StringVar(&o.outcomes, "outcomes", "", "`file` for what a producer's clients saw")
	flags.StringVar(&o.canary, "canary", "", "`text` in each payload")
	flags.StringVar(&o.queue, "queue", queue, "of a consumer")
	flags.IntVar(&o.batch, "batch", 1, "of a consumer")
	flags.BoolVar(&o.async, "async", false, "a producer's commits do not wait for the disk")
	flags.IntVar(&o.incarnation, "incarnation", 1, "which start of the process this is")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if args[0] == "run" {
		return runStorm(ctx, o, *names)
	}
	role := map[string]func(context.Context, *pgxpool.Pool, options) error{
		"producer": runProducer, "relay": runRelay, "consumer": runConsumer,
	}[args[0]]
	if role == nil {
		return fmt.Errorf("no role %q", args[0])
	}
	o.seed += uint64(o.incarnation) << 32
	db, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return fmt.Errorf("DATABASE_URL: %w", err)
	}
	defer db.Close()
	return role(ctx, db, o)
}

func runStorm(ctx context.Context, o options, names string) error {
	prefixes := strings.Split(names, ",")
	o.faults = slices.DeleteFunc(catalogue(), func(f fault) bool {
		return !slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(f.name, prefix) })
	})
	if len(o.faults) == 0 {
		return fmt.Errorf("-faults: none begins with one of %s", names)
	}
	v, err := storm(ctx, o)
	if err != nil {
		return err
	}
	if !v.OK {
		fmt.Printf("%d invariants are broken; the logs are in %s/logs\n", len(v.Violations), o.dir)
	}
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	if !v.OK {
		return errBroken
	}
	return nil
}
