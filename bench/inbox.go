package main

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
)

const (
	inboxMessages = 20_000 // one at a time
	inboxBatched  = 100_000
	inboxWorkers  = 4
)

// consume: from a full queue to effects, with a handler that writes one row, beside the
// same consumer without an inbox, one transaction per message. The row goes through the
// pipeline; single_exec and batch_exec show the handler that waits for each.
func consume(ctx context.Context, b *bench) ([]Result, error) {
	p, err := newPlace(ctx, b.databaseURL, b.amqpURL, "inbox")
	if err != nil {
		return nil, err
	}
	defer p.close(ctx)
	if _, err := p.db.Exec(ctx, "CREATE TABLE "+p.table("effects")+" (message_id text NOT NULL, n integer)"); err != nil {
		return nil, err
	}
	var results []Result
	for _, c := range []struct {
		metric string
		n      int
		batch  int
		dup    bool
		piped  bool
		target float64
	}{
		{"single", inboxMessages, 1, false, true, 0.95},
		{"single_exec", inboxMessages, 1, false, false, 0.95},
		{"batch", inboxBatched, 100, false, true, 5.0},
		{"batch_exec", inboxBatched, 100, false, false, 5.0},
		{"single_dup50", inboxMessages, 1, true, true, 0.95},
		{"batch_dup50", inboxBatched, 100, true, true, 5.0},
	} {
		var rounds []Round
		for range b.rounds {
			ours, used, err := p.consumed(ctx, c.n, c.batch, c.dup, c.piped)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.metric, err)
			}
			b.say("%s: ours %.0f/s; %s", c.metric, ours, used)
			limit, used, err := p.consumedWithout(ctx, inboxMessages, c.dup)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.metric, err)
			}
			b.say("%s: without an inbox %.0f/s; %s", c.metric, limit, used)
			rounds = append(rounds, Round{Value: ours, Limit: limit, Ratio: ours / limit})
		}
		results = append(results, sideBySide(c.metric, "msg/s", c.target, rounds))
	}
	return results, nil
}

// filled empties the tables, and fills a new queue with n deliveries; with dup each message
// comes twice.
func (p *place) filled(ctx context.Context, name string, n int, dup bool) (queue string, err error) {
	if _, err := p.db.Exec(ctx, "TRUNCATE "+p.table("inbox")+", "+p.table("inbox_parked")+", "+p.table("effects")); err != nil {
		return "", err
	}
	queue, err = p.fresh(ctx, name)
	if err != nil {
		return "", err
	}
	ch, err := p.conn.Channel()
	if err != nil {
		return "", err
	}
	defer ch.Close()
	if err := ch.Confirm(false); err != nil {
		return "", err
	}
	body := payload(payloadBytes)
	var window []*amqp.DeferredConfirmation
	for i := range n {
		id := i
		if dup {
			id = i / 2
		}
		confirm, err := ch.PublishWithDeferredConfirm(p.exchange, queue, true, false, amqp.Publishing{
			MessageId: "message-" + strconv.Itoa(id), DeliveryMode: amqp.Persistent, Timestamp: time.Now(), Body: body,
			Headers: amqp.Table{"traceparent": traceparent, "outbox-key": "key-" + strconv.Itoa(id%10_000)},
		})
		if err != nil {
			return "", err
		}
		if window = append(window, confirm); len(window) == 1000 {
			for _, confirm := range window {
				if ok, err := confirm.WaitContext(ctx); !ok || err != nil {
					return "", fmt.Errorf("not confirmed: %w", err)
				}
			}
			window = window[:0]
		}
	}
	return queue, nil
}

// pool has connections for the workers.
func (p *place) pool(ctx context.Context) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(p.dbURL)
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = inboxWorkers + 2
	return pgxpool.NewWithConfig(ctx, cfg)
}

// consumed returns how many deliveries a second our consumer settles, and the processor time.
func (p *place) consumed(ctx context.Context, n, batch int, dup, piped bool) (rate float64, used string, err error) {
	queue, err := p.filled(ctx, "ours", n, dup)
	if err != nil {
		return 0, "", err
	}
	db, err := p.pool(ctx)
	if err != nil {
		return 0, "", err
	}
	defer db.Close()
	effect := p.effectSQL()
	c, err := inbox.NewConsumer(db, p.amqpURL, queue, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if piped {
			inbox.Pipeline(tx).Queue(effect, m.ID)
			return nil
		}
		_, err := tx.Exec(ctx, effect, m.ID)
		return err
	}, inbox.Config{Schema: p.schema, Name: "bench", Workers: inboxWorkers, Batch: batch, Prefetch: 2 * inboxWorkers * max(batch, 25), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return 0, "", err
	}
	ctx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	before, began := readCPU(), time.Now()
	go func() { done <- c.Run(ctx) }()
	err = until(ctx, 5*time.Minute, "all settled", func() (bool, error) {
		s := c.Stats()
		return s.Applied+s.Duplicates >= uint64(n), nil
	})
	took := time.Since(began)
	used = readCPU().since(before, n)
	stop()
	if ended := <-done; err == nil {
		err = ended
	}
	return float64(n) / took.Seconds(), used, err
}

func (p *place) effectSQL() string { return "INSERT INTO " + p.table("effects") + " VALUES ($1, 1)" }

// consumedWithout is the consumer that everybody writes first: as many workers, a
// transaction and an ack for each delivery, no record. A duplicate has another effect.
func (p *place) consumedWithout(ctx context.Context, n int, dup bool) (rate float64, used string, err error) {
	queue, err := p.filled(ctx, "limit", n, dup)
	if err != nil {
		return 0, "", err
	}
	db, err := p.pool(ctx)
	if err != nil {
		return 0, "", err
	}
	defer db.Close()
	ch, err := p.conn.Channel()
	if err != nil {
		return 0, "", err
	}
	defer ch.Close()
	if err := ch.Qos(2*inboxWorkers*25, 0, false); err != nil {
		return 0, "", err
	}
	before, began := readCPU(), time.Now()
	deliveries, err := ch.Consume(queue, "", false, false, false, false, nil)
	if err != nil {
		return 0, "", err
	}
	effect := p.effectSQL()
	failed := make(chan error, inboxWorkers)
	var settled atomic.Int64
	for range inboxWorkers {
		go func() {
			for d := range deliveries {
				err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, effect, d.MessageId)
					return err
				})
				if err == nil {
					err = d.Ack(false)
				}
				if err != nil {
					failed <- err
					return
				}
				settled.Add(1)
			}
		}()
	}
	err = until(ctx, 5*time.Minute, "all settled", func() (bool, error) {
		select {
		case err := <-failed:
			return false, err
		default:
			return settled.Load() >= int64(n), nil
		}
	})
	return float64(n) / time.Since(began).Seconds(), readCPU().since(before, n), err
}
