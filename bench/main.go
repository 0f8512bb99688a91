// Command bench measures txbox beside what limits it, in turn and in one run: a
// result is a ratio, since absolute figures of a shared machine move. It prints a
// table for people and writes JSON.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/pprof"
	"slices"
	"strings"
	"time"
)

type bench struct {
	databaseURL, amqpURL string
	brokerDir            string
	rounds               int
	began                time.Time
}

func (b *bench) say(format string, args ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

var scenarios = []struct {
	name string
	run  func(context.Context, *bench) ([]Result, error)
}{
	{"drain", drain},
	{"hotkey", hotkey},
	{"held", held},
	{"late", late},
	{"silent", silent},
	{"blocked", blocked},
	{"idle", idle},
	{"takeover", takeover},
	{"inbox", consume},
	{"prune", prune},
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	b := &bench{databaseURL: os.Getenv("DATABASE_URL"), amqpURL: os.Getenv("AMQP_URL"), began: time.Now()}
	names := flag.String("scenario", "all", "`names`, separated by commas")
	out := flag.String("out", "", "`file` for the JSON")
	profile := flag.String("cpuprofile", "", "`file` for a profile of this process")
	flag.IntVar(&b.rounds, "rounds", 5, "how often ours and the limit take turns")
	flag.StringVar(&b.brokerDir, "broker", ".dev/rabbitmq-server", "`folder` of the broker that make up started, for scenarios that harm it")
	flag.Parse()
	if b.databaseURL == "" || b.amqpURL == "" {
		return errors.New("DATABASE_URL and AMQP_URL must be set: run make bench")
	}
	if schema := os.Getenv(childVariable); schema != "" {
		return runChild(context.Background(), schema)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	var results []Result
	for _, name := range strings.Split(*names, ",") {
		found := false
		for _, s := range scenarios {
			if s.name != name && name != "all" {
				continue
			}
			found = true
			of, err := s.run(ctx, b)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			for i := range of {
				of[i].Scenario = s.name
			}
			results = slices.Concat(results, of)
		}
		if !found {
			return fmt.Errorf("there is no scenario %q", name)
		}
	}
	print(os.Stdout, results)
	if *out != "" {
		return write(*out, results)
	}
	return nil
}
