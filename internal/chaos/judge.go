package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/checker"
)

// verdict is the last line of a run.
type verdict struct {
	Seed             uint64         `json:"seed"`
	Seconds          int            `json:"seconds"`
	Faults           map[string]int `json:"faults"`
	Messages         int64          `json:"messages"`
	Lost             int64          `json:"lost"`
	Ghosts           int64          `json:"ghosts"`
	DoubleEffects    int64          `json:"double_effects"`
	OrderViolations  int64          `json:"order_violations"`
	DuplicatesOnWire int64          `json:"duplicates_on_wire"`
	Stuck            int64          `json:"stuck"`
	RecoveryMsMax    int64          `json:"recovery_ms_max"`
	Violations       []string       `json:"violations,omitempty"`
	OK               bool           `json:"ok"`
}

// What a fault may put on the wire twice: what two relays have in flight, and after a crash
// of the database, which forgets deletes that did not wait for its disk, what was confirmed
// in the second before.
const (
	window      = 2 * (4*64 + 16)
	crashWindow = 10_000
)

// judge loads what the databases hold and asks the checker.
func (r *run) judge(ctx context.Context) (*verdict, error) {
	r.say("checking")
	if err := r.load(ctx); err != nil {
		return nil, err
	}
	crashes := int64(r.done[postgresKill])
	violations, err := r.checker.Check(ctx, checker.Allowed{
		WireDuplicates: window*int64(r.faultsDone()) + crashWindow*crashes, LostAsync: crashes > 0,
	})
	if err != nil {
		return nil, err
	}
	r.wrong = append(r.wrong, violations...)
	if err := r.secrets(); err != nil {
		return nil, err
	}
	v := &verdict{Seed: r.seed, Seconds: int(r.duration.Seconds()), Faults: r.done, RecoveryMsMax: r.recovery.Milliseconds(), OK: len(r.wrong) == 0}
	if v.Messages, err = r.checker.Messages(ctx); err != nil {
		return nil, err
	}
	if v.DuplicatesOnWire, err = r.checker.WireDuplicates(ctx); err != nil {
		return nil, err
	}
	counts := map[string]*int64{"I1": &v.Lost, "I2": &v.Ghosts, "I3": &v.DoubleEffects, "I4": &v.OrderViolations, "I7": &v.Stuck}
	for _, w := range r.wrong {
		v.Violations = append(v.Violations, fmt.Sprintf("%s: %d %s", w.Invariant, w.Count, w.What))
		if n := counts[w.Invariant]; n != nil {
			*n += w.Count
		}
		for _, life := range w.Lives {
			fmt.Println(w.Invariant, w.What+":", life)
		}
	}
	return v, nil
}

func (r *run) load(ctx context.Context) error {
	for _, l := range []struct {
		table, query string
		from         *pgxpool.Pool
	}{
		{"committed", "SELECT message_id, key, seq, hash, expected FROM committed", r.site.shop},
		{"applied", "SELECT pos, consumer, message_id, key, seq, hash FROM applied", r.site.till},
		{"parked", "SELECT message_id, '', reason FROM txbox.outbox_parked", r.site.shop},
		{"parked", "SELECT message_id::uuid, consumer, reason FROM txbox.inbox_parked", r.site.till},
	} {
		err := l.from.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
			return r.checker.Load(ctx, l.table, conn.Conn(), l.query)
		})
		if err != nil {
			return err
		}
	}
	for _, c := range r.children {
		file, err := os.Open(r.outcomeFile(c.name))
		if errors.Is(err, fs.ErrNotExist) { // it is no producer
			continue
		}
		if err != nil {
			return err
		}
		defer file.Close()
		if err := r.checker.Outcomes(ctx, file); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// left looks for what should be gone after a clean stop.
func (r *run) left(ctx context.Context) {
	err := r.site.withChannel(func(ch *amqp.Channel) error {
		for _, name := range []string{queue, otherQueue, tapQueue} {
			q, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
			if err != nil {
				return err
			}
			if q.Messages > 0 {
				r.violate("I7", fmt.Sprintf("%d messages in queue %s", q.Messages, name))
			}
		}
		return nil
	})
	if err != nil {
		r.violate("I7", err.Error())
	}
	for _, look := range []struct{ invariant, what, query string }{
		{"I7", "lanes have an owner", "SELECT count(*) FROM txbox.outbox_lane WHERE owner IS NOT NULL"},
		{"I11", "sessions of ours", "SELECT count(*) FROM pg_stat_activity WHERE usename = 'chaos' AND datname = '" + shopDatabase + "' AND pid <> pg_backend_pid() AND application_name <> 'chaos run'"},
	} {
		var n int64
		err := await(ctx, stopLimit, look.what, func(ctx context.Context) bool {
			return r.site.shop.QueryRow(ctx, look.query).Scan(&n) == nil && n == 0
		})
		if err != nil {
			r.violate(look.invariant, fmt.Sprintf("%d %s", n, look.what))
		}
	}
}

// levels are what each process holds, by name.
func (r *run) levels(context.Context) map[string]int {
	levels := make(map[string]int)
	for _, c := range r.children {
		descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
		if err == nil {
			levels[c.name] = len(descriptors)
		}
	}
	return levels
}

// slack is by how much a level may be another.
const slack = 10

func (r *run) compare(before, after map[string]int) {
	for name, n := range after {
		if before[name] > 0 && n > before[name]+slack {
			r.violate("I11", fmt.Sprintf("%s has %d descriptors, before the storm %d", name, n, before[name]))
		}
	}
}

// secrets looks for passwords and payloads in the logs.
func (r *run) secrets() error {
	logs, err := filepath.Glob(filepath.Join(r.dir, "logs", "*.log"))
	if err != nil {
		return err
	}
	for _, path := range logs {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, secret := range append(r.site.secrets, r.site.canary) {
			if at := bytes.Index(text, []byte(secret)); at >= 0 {
				line := text[bytes.LastIndexByte(text[:at], '\n')+1:]
				line, _, _ = bytes.Cut(line, []byte("\n"))
				r.violate("I13", fmt.Sprintf("%s: %s", filepath.Base(path), strings.ReplaceAll(string(line), secret, "SECRET")))
			}
		}
	}
	return nil
}
