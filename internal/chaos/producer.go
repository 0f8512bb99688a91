package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/checker"
	"github.com/txbox/txbox/internal/failpoint"
	"github.com/txbox/txbox/outbox"
)

// shopTables are the producer's: what is committed, and the last sequence number of each key.
const shopTables = `
CREATE TABLE committed (message_id uuid NOT NULL, key text, seq bigint NOT NULL, hash bigint NOT NULL, expected text NOT NULL, at timestamptz NOT NULL);
CREATE INDEX ON committed (at);
CREATE TABLE keys (key text PRIMARY KEY, seq bigint NOT NULL);
INSERT INTO keys SELECT 'key-' || n, 0 FROM generate_series(0, 499) n;
ALTER TABLE keys SET (fillfactor = 20);
`

const (
	keys    = 500
	clients = 4
	// attemptLimit bounds one transaction, so that a client is not held up by a silent server for long.
	attemptLimit = 5 * time.Second
)

// producer writes messages until ctx ends, and to a file what became of each.
type producer struct {
	db       *pgxpool.Pool
	outcomes *os.File
	canary   string
	async    bool // commits do not wait for the disk
}

// client is one of those that write at the same time.
type client struct {
	*producer
	*rand.Rand
}

func runProducer(ctx context.Context, db *pgxpool.Pool, o options) error {
	file, err := os.OpenFile(o.outcomes, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	p := &producer{db: db, outcomes: file, canary: o.canary, async: o.async}
	ticks := make(chan struct{})
	var working sync.WaitGroup
	for i := range clients {
		c := client{p, rand.New(rand.NewPCG(o.seed, uint64(i)))}
		working.Go(func() {
			for range ticks {
				c.transact(ctx)
			}
		})
	}
	every := time.Second / time.Duration(o.rate)
	for due := time.Now(); ctx.Err() == nil; due = due.Add(every) {
		if time.Since(due) > time.Second { // what a fault held up is not caught up with
			due = time.Now()
		}
		time.Sleep(time.Until(due))
		select {
		case ticks <- struct{}{}:
		case <-ctx.Done():
		}
	}
	close(ticks)
	working.Wait()
	return nil
}

var errRollback = errors.New("rolled back as planned")

// transact writes one to three messages of a key or of none, in one transaction, and notes
// what its client saw.
func (c client) transact(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attemptLimit)
	defer cancel()
	if c.IntN(100) == 0 { // a client that goes away, perhaps around COMMIT
		ctx, cancel = context.WithTimeout(ctx, time.Duration(c.IntN(4000))*time.Microsecond)
		defer cancel()
	}
	ids, outcome, err := c.write(ctx)
	if err != nil && outcome == checker.Unknown {
		fmt.Fprintln(os.Stderr, "unknown:", err)
	}
	var lines strings.Builder
	for _, id := range ids {
		fmt.Fprintln(&lines, outcome, id)
	}
	if _, err := c.outcomes.WriteString(lines.String()); err != nil { // in one write, or a kill tears it
		panic(err)
	}
}

// write returns what is known of the messages that it wrote.
func (c client) write(ctx context.Context) (ids []uuid.UUID, outcome string, err error) {
	options := pgx.TxOptions{}
	if c.async {
		options.BeginQuery = "BEGIN; SET LOCAL synchronous_commit = off"
	}
	tx, err := c.db.BeginTx(ctx, options)
	if err != nil {
		return nil, checker.Failed, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	key := ""
	if c.IntN(10) < 7 {
		key = fmt.Sprint("key-", c.IntN(keys))
	}
	n := 1 + c.IntN(3)*c.IntN(2)
	seq := int64(0)
	if key != "" {
		if err := tx.QueryRow(ctx, "UPDATE keys SET seq = seq + $2 WHERE key = $1 RETURNING seq", key, n).Scan(&seq); err != nil {
			return nil, checker.Failed, err
		}
		seq -= int64(n)
	}
	messages := make([]outbox.Message, n)
	for i := range messages {
		if key != "" {
			seq++
		}
		messages[i] = c.message(key, seq)
		ids = append(ids, messages[i].ID)
		expected := "applied"
		if parse(messages[i].Payload).Kind == poison {
			expected = "parked"
		}
		m := messages[i]
		_, err := tx.Exec(ctx, "INSERT INTO committed VALUES ($1, $2, $3, $4, $5, clock_timestamp())",
			m.ID, parse(m.Payload).key(), seq, hash(m.Payload, m.Type, m.ContentType, m.Headers), expected)
		if err != nil {
			return ids, checker.Failed, err
		}
	}
	if err := c.send(ctx, tx, messages); err != nil {
		return ids, checker.Failed, err
	}
	if c.IntN(20) == 0 {
		return ids, checker.Failed, errors.Join(errRollback, tx.Rollback(ctx))
	}
	failpoint.Hit("producer/commit")
	err = tx.Commit(ctx)
	failpoint.Hit("producer/committed")
	switch {
	case err == nil && c.async:
		return ids, checker.Async, nil
	case err == nil:
		return ids, checker.OK, nil
	case errors.Is(err, pgx.ErrTxCommitRollback):
		return ids, checker.Failed, err
	}
	return ids, checker.Unknown, err
}

// send takes one of the ways to write messages.
func (c client) send(ctx context.Context, tx pgx.Tx, messages []outbox.Message) error {
	if c.IntN(2) == 0 {
		return outbox.Write(ctx, tx, messages...)
	}
	batch := &pgx.Batch{}
	if err := outbox.Queue(ctx, batch, messages...); err != nil {
		return err
	}
	return tx.SendBatch(ctx, batch).Close()
}

func (c client) message(key string, seq int64) outbox.Message {
	b := body{Key: key, Seq: seq, At: time.Now(), Kind: plain, Canary: c.canary, Filler: strings.Repeat("x", c.IntN(400))}
	switch n := c.IntN(1000); {
	case n < 10:
		b.Kind = flaky
	case n < 15:
		b.Kind = sloppy
	case n < 17 && key == "":
		b.Kind = poison
	}
	payload, err := json.Marshal(b)
	if err != nil {
		panic(err) // it is ours
	}
	m := outbox.Message{
		ID: outbox.NewID(), Exchange: exchange, RoutingKey: routingKey, Key: key, Type: messageType, ContentType: "application/json",
		Headers: map[string]string{checkHeader: fmt.Sprint(c.Uint64())}, Payload: payload,
	}
	if key == "" && c.IntN(50) == 0 {
		m.NotBefore = time.Now().Add(time.Duration(c.IntN(3000)) * time.Millisecond)
	}
	return m
}
