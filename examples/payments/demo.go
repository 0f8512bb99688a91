package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/txbox/txbox/migrations"
)

// demo runs the shop under faults and counts what came of it.
type demo struct {
	relayPath, control string // programs: cmd/relay, and the one that does broker faults
	logs               string // folder for the services' logs
	orders, rate       int    // how many to place, and per second
	clients            int

	databaseURL, amqpURL string
	began                time.Time
	placed               atomic.Int64
	faults               faults

	ordersDB, ledgerDB, receiptsDB, naiveDB *pgxpool.Pool
}

const settleLimit = 30 * time.Second

func runDemo(ctx context.Context, args []string) error {
	d := &demo{databaseURL: os.Getenv("DATABASE_URL"), began: time.Now()}
	d.amqpURL, _, _ = strings.Cut(os.Getenv("AMQP_URL"), ",")
	flags := flag.NewFlagSet("payments demo", flag.ContinueOnError)
	flags.StringVar(&d.relayPath, "relay", "bin/relay", "the relay's `program`")
	flags.StringVar(&d.control, "broker-control", "", "`program` that takes close-connections and restart-broker; without it the broker is left alone")
	flags.StringVar(&d.logs, "logs", ".dev/demo", "`folder` for the services' logs")
	flags.IntVar(&d.orders, "orders", 10_000, "how many orders to place")
	flags.IntVar(&d.rate, "rate", 500, "orders per second")
	flags.IntVar(&d.clients, "clients", 8, "how many place them side by side")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if d.orders < 1 || d.rate < 1 || d.clients < 1 {
		return errors.New("-orders, -rate and -clients must be 1 at least")
	}
	result, err := d.run(ctx)
	if result != nil {
		fmt.Print("\n", result.table(&d.faults, time.Since(d.began)))
		err = errors.Join(err, result.verdict(d.orders))
	}
	if err != nil {
		return fmt.Errorf("%w\nThe services' logs are in %s", err, d.logs)
	}
	fmt.Println("\nEvery order was charged exactly once by the ledger, and has one receipt.")
	return nil
}

// run returns a result if it came that far.
func (d *demo) run(ctx context.Context) (*result, error) {
	if err := errors.Join(os.RemoveAll(d.logs), os.MkdirAll(d.logs, 0o755)); err != nil {
		return nil, err
	}
	d.say("preparing databases and queues")
	if err := d.prepare(ctx); err != nil {
		return nil, err
	}
	defer d.ordersDB.Close()
	defer d.ledgerDB.Close()
	defer d.receiptsDB.Close()
	defer d.naiveDB.Close()
	if err := d.declare(); err != nil {
		return nil, err
	}
	services := &services{demo: d}
	defer services.kill()
	if err := services.start(ctx); err != nil {
		return nil, err
	}
	d.say("placing %d orders at %d a second from %d clients", d.orders, d.rate, d.clients)
	declined, err := d.placeUnderFaults(ctx, services)
	if err != nil {
		return nil, err
	}
	d.say("all orders are placed; waiting for the last charges")
	settled := d.settle(ctx, services)
	result, err := d.collect(ctx, declined) // also of what did not settle: the table says what is wrong
	return result, errors.Join(settled, err)
}

// placeUnderFaults returns the orders that were declined.
func (d *demo) placeUnderFaults(ctx context.Context, services *services) ([]Order, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reporting := make(chan struct{})
	go func() { defer close(reporting); d.report(ctx) }()
	defer func() { cancel(); <-reporting }()

	shop := &shop{url: services.url(), demo: d}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return shop.place(ctx) })
	group.Go(func() error { return d.inject(ctx, services) })
	err := group.Wait()
	return shop.declined, err
}

// prepare gives each service a new database, and txbox's tables to those that use it.
func (d *demo) prepare(ctx context.Context) error {
	admin, err := pgx.Connect(ctx, d.databaseURL)
	if err != nil {
		return fmt.Errorf("DATABASE_URL: %w", err)
	}
	defer admin.Close(ctx)
	for _, service := range []struct {
		name, table string
		db          **pgxpool.Pool
	}{
		{"orders", ordersTable, &d.ordersDB},
		{"ledger", chargesTable, &d.ledgerDB},
		{"receipts", receiptsTable, &d.receiptsDB},
		{"naive", chargesTable, &d.naiveDB},
	} {
		name := pgx.Identifier{"txbox_demo_" + service.name}.Sanitize()
		for _, statement := range []string{"DROP DATABASE IF EXISTS " + name + " WITH (FORCE)", "CREATE DATABASE " + name} {
			if _, err := admin.Exec(ctx, statement); err != nil {
				return fmt.Errorf("%s: %w", statement, err)
			}
		}
		url, err := databaseURL(d.databaseURL, "txbox_demo_"+service.name)
		if err != nil {
			return err
		}
		if *service.db, err = pgxpool.New(ctx, url); err != nil {
			return err
		}
		if _, err := (*service.db).Exec(ctx, service.table); err != nil {
			return err
		}
		if service.name == "naive" {
			continue
		}
		if err := migrations.Up(ctx, url, migrations.Config{}); err != nil {
			return err
		}
	}
	return nil
}

// report prints how far it is, until ctx ends.
func (d *demo) report(ctx context.Context) {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			d.say("%5d orders, %5d charged by the ledger, %5d by the naive consumer",
				d.placed.Load(), count(ctx, d.ledgerDB, "charges"), count(ctx, d.naiveDB, "charges"))
		}
	}
}

// count returns -1 if the database does not answer.
func count(ctx context.Context, db *pgxpool.Pool, table string) (n int64) {
	if err := db.QueryRow(ctx, "SELECT count(*) FROM "+table).Scan(&n); err != nil {
		return -1
	}
	return n
}

func (d *demo) say(format string, args ...any) {
	fmt.Printf("%5.1f s  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) logFile(name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(d.logs, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
}
